"""`qdist export` and `qdist merge`: wrong flags end at once, right ones reach their process."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from qdist.cli import export as exporting
from qdist.cli import merge as merging
from qdist.cli.main import main
from qdist.core.requests import Export, Merge, Request
from qdist.host.launch import claim
from qdist.host.run.rundir import RunDir
from tests.runtime.tiny import dummy_job, save_config


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    """Two runs with adapters."""
    model = save_config(tmp_path / "model")
    for name in ("one", "two"):
        job = dummy_job(model, tmp_path / name)
        claim.write(job)
        job.run.adapter.mkdir()
    return str(tmp_path / "one"), str(tmp_path / "two")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What processes would have been asked to do."""
    made: list[Request] = []
    for module in (exporting, merging):
        monkeypatch.setattr(module, "run_task", made.append)
    return made


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output


@pytest.mark.parametrize("command", [("merge",), ("export", "--to", "16bit")])
def test_what_cannot_be_ends_before_anything_starts(
    command: tuple[str, ...], runs: tuple[str, str], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    bare = dummy_job(tmp_path / "model", tmp_path / "bare")
    claim.write(bare)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    cases = [
        ((str(tmp_path / "none"),), out, (), 2, "none is not a run"),
        (
            (str(tmp_path / "bare"),),
            out,
            (),
            2,
            "bare has no adapter yet, and no whole checkpoint\n  try: qdist launch --resume --run",
        ),
        (runs, str(tmp_path / "full"), (), 2, "full exists\n  try: another --out"),
        (runs, out, ("--weights", "1"), 2, "weights are 1, runs are 2\n  try: a weight for each run"),
        (runs, out, ("--weights", "1,x"), 2, "weights cannot be '1,x'"),
        (runs, out, ("--weights", "1,nan"), 2, "weights cannot be '1,nan': they are finite"),
        (runs, out, ("--onto", "nothing"), 2, "onto cannot be 'nothing': it is one of dequantized, original"),
        (runs, out, ("--dtype", "float32"), 2, "dtype cannot be 'float32': it is one of bfloat16, float16"),
    ]
    for given, where, flags, code, message in cases:
        found, output = invoke(*command, *given, "--out", where, *flags)
        assert (found, message in output) == (code, True), output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "code"),
    [(("merge",), 2), (("export", "--to", "16bit"), 2), (("export", "--to", "zeros", "--lossy"), 2),
     (("export", "--to", "lora"), 0)],
)  # fmt: skip
def test_what_reads_a_base_that_is_gone_is_refused_before_anything_starts(
    command: tuple[str, ...], code: int, runs: tuple[str, str], calls: list[Request], tmp_path: Path
) -> None:
    run = RunDir(runs[0])
    plan = run.plan()
    source = msgspec.structs.replace(plan.source, kind="folder", path=str(tmp_path / "gone"))
    (run.path / "plan.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(plan, source=source)))
    found, output = invoke(*command, runs[0], "--out", str(tmp_path / "out"))
    assert (found, len(calls)) == (code, int(code == 0)), output
    assert ("is no longer at" in output) == (code == 2)


def test_only_targets_that_there_are_are_offered(runs: tuple[str, str], tmp_path: Path) -> None:
    code, output = invoke("export", *runs, "--out", str(tmp_path / "out"), "--to", "nothing")
    assert code == 2
    assert "16bit" in output
    assert invoke("export", runs[0], "--out", str(tmp_path / "out"))[0] == 2


def test_an_option_of_another_target_is_refused(runs: tuple[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    code, output = invoke("export", *runs, "--out", out, "--to", "16bit", "--lossy")
    assert code == 2
    assert "--lossy is of --to zeros, not 16bit\n  try: leave it out" in output


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), {}),
        (
            ("--onto", "original", "--dtype", "float16", "--weights", "0.7,-1e-3"),
            {"onto": "original", "dtype": "float16", "weights": (0.7, -1e-3)},
        ),
    ],
)
def test_flags_reach_the_process_that_writes(
    flags: tuple[str, ...], told: dict[str, Any], runs: tuple[str, str], tmp_path: Path, calls: list[Request]
) -> None:
    out = str(tmp_path / "out")
    assert invoke("merge", *runs, "--out", out, *flags)[0] == 0
    assert invoke("export", *runs, "--to", "16bit", "--out", out, *flags)[0] == 0
    assert calls == [Merge(runs=runs, out=out, **told), Export(to="16bit", runs=runs, out=out, **told)]


@pytest.mark.parametrize(
    ("target", "flags", "told"),
    [
        ("lora", "", {}),
        ("gguf", "--onto original --type q8_0", {"onto": "original", "type": "q8_0"}),
        (
            "gptq",
            "--onto original --data demo --samples 8 --bits 3 --group-size 32",
            {"onto": "original", "data": "demo", "samples": 8, "bits": 3, "group_size": 32},
        ),
        ("zeros", "--lossy", {"lossy": True}),
    ],
)
def test_each_target_takes_its_own_flags(
    target: Any, flags: str, told: dict[str, Any], runs: tuple[str, str], tmp_path: Path, calls: list[Request]
) -> None:
    out = str(tmp_path / "out.gguf")
    assert invoke("export", runs[0], "--to", target, "--out", out, *flags.split())[0] == 0
    assert calls == [Export(to=target, runs=runs[:1], out=out, **told)]


@pytest.mark.parametrize(
    ("target", "flags", "message"),
    [
        ("lora", ("--dtype", "float16"), "--dtype is of --to 16bit, not lora"),
        ("16bit", ("--type", "f16"), "--type is of --to gguf, not 16bit"),
        ("gguf", ("--samples", "3"), "--samples is of --to gptq, not gguf"),
        ("zeros", ("--onto", "original"), "--onto is of --to 16bit and gguf and gptq, not zeros"),
        ("gptq", ("--lossy",), "--lossy is of --to zeros, not gptq"),
        ("gptq", ("--data", "nowhere.txt"), "nowhere.txt does not exist"),
        ("gptq", ("--group-size", "48"), "group size cannot be 48"),
        ("gguf", (), "is not the name of a GGUF file\n  try: --out"),
    ],
)
def test_flags_of_other_targets_are_refused(
    target: str, flags: tuple[str, ...], message: str, runs: tuple[str, str], tmp_path: Path, calls: list[Request]
) -> None:
    out = str(tmp_path / ("out.gguf" if flags else "out"))
    code, output = invoke("export", runs[0], "--to", target, "--out", out, *flags)
    assert code == 2
    assert message in output
    assert calls == []


def test_exact_merges_take_no_flags_of_16_bit_models(tmp_path: Path, calls: list[Request]) -> None:
    job = dummy_job(save_config(tmp_path / "model"), tmp_path / "run", method="qa-lora", **{"quant.group_size": 32})
    claim.write(job)
    job.run.adapter.mkdir()
    for flags in (("--onto", "dequantized"), ("--dtype", "bfloat16")):
        code, output = invoke("merge", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *flags)
        assert code == 2
        assert "QA-LoRA is merged into its GPTQ checkpoint as it is" in output
    assert calls == []
    assert invoke("merge", str(tmp_path / "run"), "--out", str(tmp_path / "out"))[0] == 0
