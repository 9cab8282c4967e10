from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from qdist.cli import convert as command
from qdist.cli.main import main
from qdist.core.requests import Convert, Request


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["convert", *arguments], prog_name="qdist")
    return result.exit_code, result.output


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "llama.pth").write_bytes(b"PK")
    return str(tmp_path / "llama.pth")


def test_flags_reach_the_process_that_converts(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Request] = []
    monkeypatch.setattr(command, "run_task", calls.append)
    out, config = str(tmp_path / "out"), tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_text("{}")
    assert invoke(source, "--from", "sparsebit", "--out", out)[0] == 0
    assert invoke(source, "--from", "sparsebit", "--out", out, "--config", str(config), "--drop-bias")[0] == 0
    plain = Convert(source=source, out=out, origin="sparsebit")
    assert calls == [plain, msgspec.structs.replace(plain, config=str(config), drop_bias=True)]


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    code, output = invoke(str(tmp_path / "nothing.pt"), "--from", "sparsebit", "--out", str(tmp_path / "out"))
    assert code == 2
    assert "no file" in output


@pytest.mark.parametrize("there", ["folder", "file"])
def test_an_out_that_exists_is_refused(there: str, source: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    code, output = invoke(source, "--from", "sparsebit", "--out", str(out))
    assert code == 2
    assert "out exists\n  try: another --out" in output


def test_a_config_folder_without_config_is_refused(source: str, tmp_path: Path) -> None:
    code, output = invoke(source, "--from", "sparsebit", "--out", str(tmp_path / "out"), "--config", str(tmp_path))
    assert code == 2
    assert "config.json\n  try: a folder with the model's config.json and tokenizer" in output


@pytest.mark.parametrize("arguments", ["--out out", "--from autogptq --out out", "--from sparsebit"])
def test_a_format_and_a_folder_must_be_given(arguments: str, source: str) -> None:
    assert invoke(source, *arguments.split())[0] == 2
