"""What is said when a job that keeps its work is stopped."""

import pytest

from qdist.cli import kept


def test_a_stopped_job_is_told_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(module: str, arguments: tuple[str, ...]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(kept, "run_module", stop)
    assert kept.run_kept("a.module", ()) == 130
    assert capsys.readouterr() == ("", "stopped; the same command goes on from what is written\n")


def test_a_job_that_ends_by_itself_keeps_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "run_module", lambda module, arguments: 3)
    assert kept.run_kept("a.module", ()) == 3
