"""What `qdist web` asks of the process that serves the page, and what it refuses before."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from qdist.cli import web
from qdist.cli.main import main
from qdist.core.requests import Web


def test_flags_reach_the_process_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Web] = []
    monkeypatch.setattr(web, "run_task", asked.append)
    monkeypatch.setattr(web, "check_target", lambda *_, **__: None)
    result = CliRunner().invoke(main, ["web", "runs/a", "--port", "0", "--no-open"], prog_name="qdist")
    assert (result.exit_code, result.output) == (0, "")
    assert asked == [Web(runs=("runs/a",), port=0, opens=False)]


def test_what_is_neither_run_nor_model_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["web", str(tmp_path)], prog_name="qdist")
    assert (result.exit_code, "is neither a run nor a model" in result.stderr) == (2, True)


def test_without_its_packages_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdist.cli.serve.find_spec", lambda name: None)
    monkeypatch.setattr(web, "check_target", lambda *_, **__: None)
    result = CliRunner().invoke(main, ["web", "smollm2-135m"], prog_name="qdist")
    assert result.stderr == "error: serving needs starlette and uvicorn\n  try: pip install 'qdist[serve]'\n"
