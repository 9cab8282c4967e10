"""Does `launch` show its run on a terminal, and as lines elsewhere?"""

import io
import sys
from pathlib import Path

import msgspec
import pytest

from qdist.cli.watch import Watch
from qdist.core.events import Event
from qdist.host.rundir import RunDir
from tests.plans import CPU, planned

STEPS = [Event(kind="step", step=step, total_steps=5, loss=2.0, tokens=64, seconds=1.0, time=1.0) for step in (1, 2)]


class Terminal(io.StringIO):
    """Where a view is drawn."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "r1")
    run.path.mkdir()
    (run.path / "plan.json").write_bytes(msgspec.json.encode(planned("smollm2-135m", CPU, {"gpus": 2})))
    return run


@pytest.mark.parametrize("with_run", [True, False])
def test_the_last_picture_stays_on_the_terminal(run: RunDir, monkeypatch: pytest.MonkeyPatch, with_run: bool) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "80"), ("LINES", "24"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with Watch(run.plan(), width=80, run=run if with_run else None) as watch:
        watch.show(STEPS[:1])
        watch.say("stopping")
        watch.show(STEPS[1:])
    written = terminal.getvalue()
    assert "stopping" in written
    assert "step 2/5" in written.rpartition("step 1/5")[2]
    assert "\x1b[?1049h" not in written


def test_without_a_terminal_each_step_is_a_line(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with Watch(run.plan(), width=80) as watch:
        watch.recall(STEPS[:1])
        watch.show([STEPS[1], Event(kind="step", step=2, rank=1)])
    assert capsys.readouterr().out == "step 2/5  loss 2.000  64 tok/s  3 s left\n"
