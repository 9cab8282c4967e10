import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qdist.cli import quantize as command
from qdist.cli.main import main
from qdist.core.model.storage import Packing
from qdist.core.requests import GptqSettings, MakeGptq, Pack, Request


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["quantize", *arguments], prog_name="qdist")
    return result.exit_code, result.output


GPTQ = ("--method", "gptq", "--data", "demo")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What processes would have been asked to do."""
    made: list[Request] = []
    monkeypatch.setattr(command, "run_task", made.append)
    return made


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "nf5"), "method cannot be 'nf5': it is one of nf4, fp4, int8, gptq\n  try: --method nf4"),
        (("--method", "int8", "--no-double"), "int8 has one scale a row"),
        (("--bits", "4", "--desc-act"), "--bits, --desc-act: gptq alone, not nf4\n  try: leave it out"),
        (("--method", "gptq"), "gptq needs calibration data\n  try: --data FILE"),
        (("--method", "gptq", "--dtype", "float16"), "--dtype: nf4, fp4 and int8 alone, not gptq"),
        ((*GPTQ, "--bits", "5"), "bits cannot be 5: GPTQ has 2, 3, 4 or 8\n  try: --bits 4"),
        ((*GPTQ, "--candidate-bits", "2,x", "--max-error", "0.1"), "bits cannot be x: GPTQ has 2, 3, 4 or 8"),
        ((*GPTQ, "--group-size", "100"), "group size cannot be 100: it is -1 or a multiple of 32"),
        ((*GPTQ, "--damping", "0"), "damping cannot be 0: it is above 0 and at most 1"),
        ((*GPTQ, "--candidate-bits", "2,4"), "--candidate-bits and --max-error go together"),
        ((*GPTQ, "--max-error", "0.1"), "--candidate-bits and --max-error go together"),
        ((*GPTQ, "--candidate-bits", "2,4", "--max-error", "2"), "max error cannot be 2: it is between 0 and 1"),
        ((*GPTQ, "--bits", "4", "--candidate-bits", "2,4", "--max-error", "0.1"), "--bits and --candidate-bits both"),
    ],
)
def test_a_wrong_flag_ends_in_two_lines_and_code_2(
    arguments: tuple[str, ...], message: str, model: str, tmp_path: Path
) -> None:
    code, output = invoke(model, "--out", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert message in output


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl"])
def test_calibration_data_that_is_missing_is_refused_at_once(name: str, model: str, tmp_path: Path) -> None:
    data = str(tmp_path / name)
    code, output = invoke(model, "--out", str(tmp_path / "out"), "--method", "gptq", "--data", data)
    assert code == 2
    assert f"{data} does not exist" in output


def test_a_folder_with_something_in_it_is_refused(model: str, tmp_path: Path) -> None:
    code, output = invoke(model, "--out", model)
    assert code == 2
    assert "exists\n  try: another --out" in output


def test_a_model_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    code, output = invoke(str(tmp_path / "nothing"), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "no folder" in output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), {}),
        (("--method", "fp4", "--no-double"), {"method": "fp4", "double": False}),
        (("--method", "int8", "--dtype", "float16"), {"method": "int8", "dtype": "float16"}),
        (("--double",), {"double": True}),
    ],
)
def test_flags_reach_the_process_that_packs(
    arguments: tuple[str, ...], told: dict[str, Any], model: str, tmp_path: Path, calls: list[Request]
) -> None:
    out = str(tmp_path / "out")
    assert invoke(model, "--out", out, *arguments)[0] == 0
    assert calls == [Pack(model=model, out=out, **told)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), {}),
        (("--bits", "3"), {"bits": (3,), "format": "gptq_v2"}),
        (("--no-sym", "--bits", "3"), {"bits": (3,), "format": "gptq_v2", "sym": False}),
        (
            ("--no-sym", "--format", "gptq", "--desc-act", "--group-size", "-1"),
            {"group_size": -1, "format": "gptq", "sym": False, "desc_act": True},
        ),
        (
            ("--candidate-bits", "4,2,3", "--max-error", "0.05", "--samples", "1000000", "--seq-len", "64"),
            {"bits": (2, 3, 4), "format": "gptq_v2", "max_error": 0.05, "samples": 1_000_000, "seq_len": 64},
        ),
    ],
)
def test_flags_of_gptq_reach_the_process_that_quantizes(
    arguments: tuple[str, ...], told: dict[str, Any], model: str, tmp_path: Path, calls: list[Request]
) -> None:
    out = str(tmp_path / "out")
    assert invoke(model, "--out", out, *GPTQ, *arguments)[0] == 0
    assert calls == [MakeGptq(model=model, out=out, settings=GptqSettings(data="demo", **told))]


@pytest.mark.parametrize(
    ("told", "packing"),
    [
        ({}, Packing(bits=4)),
        (
            {"method": "fp4", "double": False, "dtype": "float16"},
            Packing(bits=4, type="fp4", double=False, dtype="float16"),
        ),
        ({"method": "int8"}, Packing(bits=8)),
    ],
)
def test_what_is_asked_for_is_what_is_packed_to(told: dict[str, Any], packing: Packing) -> None:
    assert Pack(model="m", out="o", **told).packing == packing
