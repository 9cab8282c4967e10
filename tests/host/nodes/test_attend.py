"""Is a run of several nodes followed to its end, shown, stopped and told as one of this machine is?"""

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import msgspec
import pytest

from qdist.core.errors import JobError
from qdist.core.telemetry.events import Event
from qdist.host.nodes.attend import attend
from qdist.host.run.rundir import RunDir
from tests.host.nodes.fakes import agents_of, is_running, starts
from tests.plans import CPU, planned


class Seen:
    """A view that keeps what it is shown."""

    def __init__(self, at_show: Callable[[], None] = lambda: None) -> None:
        self.lines: list[str] = []
        self._at_show = at_show

    def recall(self, events: list[Event]) -> None:
        self.lines.append(f"recalled {len(events)}")

    def show(self, events: list[Event]) -> None:
        at_show, self._at_show = self._at_show, lambda: None
        at_show()

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def run(bed: Path) -> RunDir:
    (bed / "run/plan.json").write_bytes(msgspec.json.encode(planned("smollm2-135m", CPU)))
    return RunDir(bed / "run")


def attended(run: RunDir, seen: Seen, said: list[str], **does: str) -> None:
    attend(run, agents_of(run.path.parent, **does), view=lambda plan: nullcontext(seen), say=said.append)


def test_a_run_that_finishes_is_shown_and_leaves_no_record_of_an_early_end(run: RunDir) -> None:
    seen, said = Seen(), list[str]()
    attended(run, seen, said, a="finish", b="finish")
    assert "recalled 0" in seen.lines
    assert run.ended() is None


def test_qdist_stop_ends_all_nodes(run: RunDir) -> None:
    seen = Seen(at_show=(run.path / "stop").touch)
    with pytest.raises(KeyboardInterrupt):
        attended(run, seen, [], a="wait", b="wait")
    assert "stopping after this step, with a checkpoint: qdist stop asked for it" in seen.lines
    ended = run.ended()
    assert ended is not None
    assert ended.state == "stopped"
    assert not run.stop_requested()


def test_ctrl_c_before_the_first_step_kills_all_at_once(run: RunDir) -> None:
    seen = Seen(at_show=lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        attended(run, seen, [], a="wait", b="wait")
    assert "stopped before the first step; nothing to save" in seen.lines
    assert not any(is_running(line) for name in "ab" for line in starts(run.path.parent, name))


def test_a_node_that_leaves_before_the_first_step_promises_no_checkpoint(run: RunDir) -> None:
    seen = Seen(at_show=lambda: os.kill(os.getpid(), signal.SIGTERM))
    agents = agents_of(run.path.parent, a="wait")
    with pytest.raises(JobError):
        attend(run, agents, view=lambda plan: nullcontext(seen), say=seen.say, leaves=True)
    assert "leaving the run before its first step here; the others go on where they may" in seen.lines


def test_a_failed_run_is_told_with_the_name_of_the_host_and_recorded(run: RunDir) -> None:
    with pytest.raises(JobError, match="no room on a"):
        attended(run, Seen(), [], a="fail")
    ended = run.ended()
    assert ended is not None
    assert (ended.state, ended.try_) == ("failed", "make room there")
