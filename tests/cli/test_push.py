"""Does `qdist push` refuse before anything starts what no hub would take, and hand on the rest?"""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qdist.cli import push as command
from qdist.cli.main import main
from qdist.core.requests import Push, Request


def qdist(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["push", *arguments], prog_name="qdist")


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_flags_reach_the_process_that_uploads(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Request] = []
    monkeypatch.setattr(command, "run_task", calls.append)
    assert qdist(str(adapter), "me/alpaca").exit_code == 0
    assert qdist(str(adapter), "me/alpaca", "--what", "merged", "--private", "--revision", "v2").exit_code == 0
    plain = Push(run=str(adapter), repo="me/alpaca")
    assert calls == [plain, Push(run=str(adapter), repo="me/alpaca", what="merged", private=True, revision="v2")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ADAPTER", "alpaca"), "'alpaca' is not OWNER/NAME"),
        (("nothing", "me/alpaca"), "nothing is not a run"),
        (("ADAPTER", "me/alpaca", "--what", "all"), "what cannot be 'all'"),
    ],
)
def test_what_cannot_be_is_refused_in_two_lines(arguments: tuple[str, ...], said: str, adapter: Path) -> None:
    result = qdist(*(str(adapter) if word == "ADAPTER" else word for word in arguments))
    assert result.exit_code == 2
    assert said in result.stderr
    assert "  try: " in result.stderr


def test_a_folder_without_weights_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    result = qdist(str(adapter), "me/alpaca")
    assert (result.exit_code, "has no adapter_model.safetensors" in result.stderr) == (2, True)
