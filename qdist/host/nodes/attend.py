"""Follows the agents of a run of several nodes to its end, shows it, and stops it on request."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import NamedTuple, Protocol

from qdist.core.errors import JobError, QdistError
from qdist.core.nodes.job import LEFT, STOPPED
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.events import Event
from qdist.host.launch.ranks import ask_to_stop, show_new
from qdist.host.launch.trackers import Tracking
from qdist.host.nodes.agents import Agents
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import STOP, Ended, RunDir
from qdist.host.run.state import note

_LOOK_S = 0.2


class View(Protocol):
    """Where a run is shown: `qdist.cli.watch.Watch`."""

    def recall(self, events: list[Event]) -> None:
        """Take events from before the run was resumed, without showing them again."""

    def show(self, events: list[Event]) -> None:
        """Show new events of the ranks."""

    def say(self, text: str) -> None:
        """Show a line for the user."""


def attend(
    run: RunDir,
    agents: Agents,
    *,
    view: Callable[[Plan], AbstractContextManager[View]],
    say: Callable[[str], None],
    tracks: bool = True,
    leaves: bool = False,
) -> None:
    """Start agents that are not started yet, and stay until they have ended; none of them is left then.

    view: called with the first plan that the nodes agree on. say: called with a line for the user before that.
    tracks: whether this process sends the run's figures to its trackers; one of the nodes' launchers does.
    leaves: whether SIGTERM has this node leave the run to the others, instead of stopping all of it.
    Raises KeyboardInterrupt when the run was stopped and saved, JobError when it failed.
    """
    follower = Follower(run.path, say=say)
    past = follower.new_events()
    with agents, _hearing(agents) as asked:
        request = _Request(run, agents, asked, leaves=leaves)
        plan = _awaited_plan(run, agents, request, say)
        if plan is not None:
            names = plan.spec.trackers if tracks else ()
            with view(plan) as shown, Tracking(run, names, say=shown.say) as tracking:
                shown.recall(past)
                _follow(run, agents, request, follower, shown, tracking.look)
        code = agents.wait()
        error = agents.error  # of one that was killed it is read from what it left, which is closed after this
    _conclude(run, error, code, asked=bool(asked))


@contextmanager
def _hearing(agents: Agents) -> Iterator[list[int]]:
    """Collect the signals that ask this process to end, in place of ending; the second one kills all agents."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            agents.kill()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Request(NamedTuple):
    """What signals ask for. asked: those that came."""

    run: RunDir
    agents: Agents
    asked: list[int]
    leaves: bool

    def pass_on(self, say: Callable[[str], None], *, has_stepped: bool) -> None:
        """Have all nodes save and end; or this one leave, where SIGTERM takes this machine away."""
        if self.leaves and self.asked[0] == signal.SIGTERM:
            when = "after this step, with a checkpoint" if has_stepped else "before its first step here"
            say(f"leaving the run {when}; the others go on where they may")
            self.agents.leave()
        else:
            ask_to_stop(self.run, self.agents, say, has_stepped=has_stepped, loses="")


def _awaited_plan(run: RunDir, agents: Agents, request: _Request, say: Callable[[str], None]) -> Plan | None:
    """The first plan that the nodes agree on; None if the agents ended, or were told to, before there was one."""
    asked = request.asked
    while agents.poll() is None and not agents.generation and not asked:
        _tell(agents, say)
        time.sleep(_LOOK_S)
    _tell(agents, say)
    if asked:
        request.pass_on(say, has_stepped=False)
    return run.plan() if agents.generation and not asked else None


def _follow(
    run: RunDir,
    agents: Agents,
    request: _Request,
    follower: Follower,
    shown: View,
    look: Callable[[], None],
) -> None:
    """Show what ranks and agents say until the agents have ended; ask them to stop when this process is."""
    stepped, answered, readable = False, False, True

    def show(events: list[Event]) -> None:
        nonlocal stepped
        stepped = stepped or any(event.kind == "step" for event in events)
        shown.show(events)

    while agents.poll() is None:
        wanted = bool(request.asked)
        readable = readable and show_new(follower, show, shown.say)
        _tell(agents, shown.say)
        look()
        if wanted and not answered:
            answered = True
            request.pass_on(shown.say, has_stepped=stepped or not readable)
        elif not answered and run.stop_requested():
            answered = True
            shown.say("stopping after this step, with a checkpoint: qdist stop asked for it")
        time.sleep(_LOOK_S)
    if readable:
        show_new(follower, show, shown.say)
    _tell(agents, shown.say)


def _tell(agents: Agents, say: Callable[[str], None]) -> None:
    for line in agents.new_lines():
        say(line)


def _conclude(run: RunDir, error: QdistError | None, code: int, *, asked: bool) -> None:
    """Record how the run ended, unless an agent has; raise what its launcher ends with."""
    if code in (0, STOPPED):
        (run.path / STOP).unlink(missing_ok=True)
    if code == 0:
        return
    if code == LEFT:
        raise JobError(f"this node has left {run.path}, as SIGTERM asked", try_="the same command, to join it again")
    known = run.ended()
    if code == STOPPED or (asked and code == -signal.SIGKILL):
        if known is None:
            note(run, Ended(state="stopped", time=time.time()))
        raise KeyboardInterrupt
    error = error or JobError(f"the agents ended with exit code {code}", try_=f"read {run.logs}")
    if known is None:
        note(run, Ended(state="failed", message=error.message, try_=error.try_, time=time.time()))
    raise error
