import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qdist.cli import quantize as command
from qdist.cli.main import main


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["quantize", *arguments], prog_name="qdist")
    return result.exit_code, result.output


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "gptq"), "gptq needs calibration data and is not there yet\n  try: --method nf4"),
        (("--method", "nf5"), "method cannot be 'nf5': it is one of nf4, fp4, int8\n  try: --method nf4"),
        (("--method", "int8", "--no-double"), "int8 has one scale a row"),
    ],
)
def test_a_wrong_method_ends_in_two_lines_and_code_2(
    arguments: tuple[str, ...], message: str, model: str, tmp_path: Path
) -> None:
    code, output = invoke(model, "--out", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert message in output


def test_a_folder_with_something_in_it_is_refused(model: str, tmp_path: Path) -> None:
    code, output = invoke(model, "--out", model)
    assert code == 1
    assert "exists\n  try: another --out" in output


def test_a_model_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    code, output = invoke(str(tmp_path / "nothing"), "--out", str(tmp_path / "out"))
    assert code == 1
    assert "no folder" in output


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        ((), ("--method", "nf4")),
        (("--method", "fp4", "--no-double"), ("--method", "fp4", "--single")),
        (("--method", "int8", "--dtype", "float16"), ("--method", "int8", "--dtype", "float16")),
        (("--double",), ("--method", "nf4")),
    ],
)
def test_flags_reach_the_process_that_packs_and_its_code_comes_back(
    arguments: tuple[str, ...], passed: tuple[str, ...], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, tuple[str, ...]]] = []
    monkeypatch.setattr(command, "run_module", lambda module, given: calls.append((module, tuple(given))) or 3)
    out = str(tmp_path / "out")
    code, _ = invoke(model, "--out", out, *arguments)
    assert code == 3
    assert calls == [("qdist.runtime.quantize", (model, out, *passed))]
