"""Does `launch` show its run on a terminal, and as lines elsewhere?"""

import io
import json
import sys
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from qdist.cli.views.screen import Painter
from qdist.cli.watch import Watch, ending
from qdist.core.telemetry.events import Event
from qdist.host.run.rundir import RunDir
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


def test_the_last_picture_stays_on_the_terminal(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "80"), ("LINES", "24"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with Watch(run.plan(), run, width=80) as watch:
        watch.show(STEPS[:1])
        watch.say("stopping")
        watch.show(STEPS[1:])
    written = terminal.getvalue()
    assert "stopping" in written
    assert "step 2/5" in written.rpartition("step 1/5")[2]
    assert "\x1b[?1049h" not in written


def test_without_a_terminal_each_step_is_a_line(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with Watch(run.plan(), run, width=80) as watch:
        watch.recall(STEPS[:1])
        watch.show([STEPS[1], Event(kind="step", step=2, rank=1)])
        watch.show([])
    assert capsys.readouterr().out == "step 2/5  loss 2.000  64 tok/s  3 s left\n"


def test_time_left_is_that_of_the_run_and_not_of_one_slow_step(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    slow = Event(kind="step", step=3, total_steps=5, loss=2.0, tokens=64, seconds=9.0, time=1.0)
    with Watch(run.plan(), run, width=80) as watch:
        watch.recall(STEPS)
        watch.show([slow])
    assert capsys.readouterr().out == "step 3/5  loss 2.000  7 tok/s  2 s left\n"


def test_a_terminal_that_cannot_be_drawn_on_gets_lines(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "dumb")
    with Watch(run.plan(), run, width=80) as watch:
        watch.show(STEPS[:1])
        assert "step 1/5  loss 2.000" in terminal.getvalue()
    assert "\x1b" not in terminal.getvalue()


def test_a_run_goes_on_where_its_view_cannot_be_read(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "200"), ("LINES", "24"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    (run.path / "ended.json").write_text("torn")
    (run.events).mkdir()
    run.event_file(0).touch()
    with Watch(run.plan(), run, width=80) as watch:
        watch.show(STEPS[:1])
        (run.path / "result.json").write_text("{")
        watch._due = 0.0
        watch.show(STEPS[1:])
    assert terminal.getvalue().count("the view stands still: ") == 2


def test_a_view_that_takes_long_is_drawn_less_often(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = [100.0], []

    def draw(watch: Watch, painter: Painter) -> None:
        drawn.append(now[0])
        now[0] += 0.5

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Watch, "_draw", draw)
    monkeypatch.setattr("qdist.cli.watch.time.monotonic", lambda: now[0])
    with Watch(run.plan(), run, width=80) as watch:
        while now[0] < 125:
            watch.show(STEPS)
            now[0] += 0.2
    gaps = [after - before for before, after in pairwise(drawn[:-1])]
    assert len(gaps) == 2
    assert all(10 < gap < 11 for gap in gaps)


@pytest.mark.parametrize(("after", "told"), [(2.0004, False), (2.01, True), (1.9, False)])
def test_a_held_out_loss_that_rose_is_told_where_it_can_be_seen(
    run: RunDir, after: float, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    peak = {"allocated": 1 << 30, "reserved": 0, "context": 0, "load": 0}
    result = {
        "steps": 5, "held_out": [[0, 2.0], [5, after]], "answers": [], "adapter_bytes": 1, "adapter_parameters": 1,
        "peak_bytes": peak, "peaks": [[peak], [peak]], "tokens_per_s": {"predicted": 0.0, "measured": None},
        "start_seconds": {"load": None, "first_step": None},
    }  # fmt: skip
    (run.path / "result.json").write_text(json.dumps(result))
    ending(run, run.plan())
    assert ("the held-out loss rose" in capsys.readouterr().out) == told
