"""What `qdist serve` hands on, and what it refuses before a process is started."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qdist.cli import serve
from qdist.cli.main import main
from qdist.core.requests import Serve
from qdist.host.sources import targets
from qdist.host.sources.targets import ServedTargets


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> list[Serve]:
    """What a process is asked to do; any model is there."""
    seen: list[Serve] = []
    monkeypatch.setattr(serve, "run_task", seen.append)
    monkeypatch.setattr(targets, "check_model", lambda name, *, trusted: None)
    return seen


def typed(*words: str) -> Result:
    return CliRunner().invoke(main, ["serve", *words], prog_name="qdist")


def test_flags_become_the_request(handed_on: list[Serve]) -> None:
    assert typed("smollm2-135m", "--port", "0", "--slots", "4", "--context", "512", "--queue", "9").exit_code == 0
    assert handed_on == [Serve(runs=("smollm2-135m",), port=0, slots=4, context=512, queue=9)]
    assert typed("smollm2-135m", "--dtype", "float32").exit_code == 0
    assert handed_on[1] == Serve(runs=("smollm2-135m",), dtype="float32")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--port", "70000"], "port cannot be '70000'"),
        (["m", "--engine", "vlm"], "engine cannot be 'vlm'"),
        (["m", "--out", "o"], "--out goes with --engine vllm"),
        (["m", "--engine", "vllm", "--max-memory", "1GiB"], "--max-memory is of qdist's own engine"),
        (["m", "n"], "m is no run, and a model is served alone"),
        ([], "missing argument"),
    ],
)
def test_what_cannot_be_is_refused(handed_on: list[Serve], words: list[str], message: str) -> None:
    result = typed(*words)
    assert (result.exit_code, handed_on) == (2, [])
    assert message in result.stderr


def test_a_missing_package_is_named_with_the_way_to_get_it(
    handed_on: list[Serve], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    result = typed("m")
    assert (result.exit_code, handed_on) == (2, [])
    assert "serving needs starlette and uvicorn\n  try: pip install 'qdist[serve]'" in result.stderr


def test_vllm_is_started_by_the_command_itself(handed_on: list[Serve], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("qdist.host.launch.vllm.serve", lambda *given: seen.append(given))
    assert typed("my=m", "--engine", "vllm").exit_code == 0
    assert handed_on == []
    assert seen == [(Serve(runs=("my=m",), engine="vllm"), ServedTargets({"": "m"}, "my"))]


def test_a_server_answers_ctrl_c_and_sigterm_itself() -> None:
    assert (Serve.asks, Serve.passes_on_sigterm) == (True, True)


def test_a_models_folder_is_served_by_its_name(handed_on: list[Serve], tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert targets.targets_to_serve([str(folder)]) == ServedTargets({"": str(folder)}, "my-model")
    assert targets.targets_to_serve([f"it={folder}"]) == ServedTargets({"": str(folder)}, "it")
    assert targets.targets_to_serve(["org/model"]).base == "org/model"
