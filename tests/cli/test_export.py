"""`qdist export` and `qdist merge`: wrong flags end at once, right ones reach their process."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from qdist.cli import export as exporting
from qdist.cli import merge as merging
from qdist.cli.main import main
from qdist.host import launcher
from tests.runtime.tiny import dummy_job, save_config


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    """Two runs with adapters."""
    model = save_config(tmp_path / "model")
    for name in ("one", "two"):
        job = dummy_job(model, tmp_path / name)
        launcher.write(job)
        job.run.adapter.mkdir()
    return str(tmp_path / "one"), str(tmp_path / "two")


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output


@pytest.mark.parametrize("command", [("merge",), ("export", "--to", "16bit")])
def test_what_cannot_be_ends_before_anything_starts(
    command: tuple[str, ...], runs: tuple[str, str], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    bare = dummy_job(tmp_path / "model", tmp_path / "bare")
    launcher.write(bare)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    cases = [
        ((str(tmp_path / "none"),), out, (), 1, "none is not a run"),
        ((str(tmp_path / "bare"),), out, (), 1, "bare has no adapter yet\n  try: qdist gather"),
        (runs, str(tmp_path / "full"), (), 1, "full exists\n  try: another --out"),
        (runs, out, ("--weights", "1"), 2, "weights are 1, runs are 2\n  try: a weight for each run"),
        (runs, out, ("--weights", "1,x"), 2, "weights cannot be '1,x'"),
        (runs, out, ("--weights", "1,nan"), 2, "weights cannot be '1,nan': they are finite"),
        (runs, out, ("--onto", "nothing"), 2, "'nothing' is not one of"),
        (runs, out, ("--dtype", "float32"), 2, "'float32' is not one of"),
    ]
    for given, where, flags, code, message in cases:
        found, output = invoke(*command, *given, "--out", where, *flags)
        assert (found, message in output) == (code, True), output
    assert not (tmp_path / "out").exists()


def test_only_targets_that_there_are_are_offered(runs: tuple[str, str], tmp_path: Path) -> None:
    code, output = invoke("export", *runs, "--out", str(tmp_path / "out"), "--to", "nothing")
    assert code == 2
    assert "16bit" in output
    assert invoke("export", runs[0], "--out", str(tmp_path / "out"))[0] == 2


@pytest.mark.parametrize(
    ("flags", "passed"),
    [
        ((), ("--onto", "dequantized", "--dtype", "bfloat16")),
        (
            ("--onto", "original", "--dtype", "float16", "--weights", "0.7,-1e-3"),
            ("--onto", "original", "--dtype", "float16", "--weights=0.7,-0.001"),
        ),
    ],
)
def test_flags_reach_the_process_that_writes_and_its_code_comes_back(
    flags: tuple[str, ...], passed: tuple[str, ...], runs: tuple[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls: list[tuple[str, tuple[str, ...]]] = []
    out = str(tmp_path / "out")
    for module in (exporting, merging):
        monkeypatch.setattr(module, "run_module", lambda name, given: calls.append((name, tuple(given))) or 3)
    assert invoke("merge", *runs, "--out", out, *flags)[0] == 3
    assert invoke("export", *runs, "--to", "16bit", "--out", out, *flags)[0] == 3
    arguments = (*runs, "--out", out, *passed)
    assert calls == [("qdist.runtime.merge", arguments), ("qdist.runtime.exports.main", ("16bit", *arguments))]
