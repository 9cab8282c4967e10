"""Starts the ranks of a written run through a backend, follows them to the end, and stops them on request."""

import contextlib
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from qdist.core.errors import RunError
from qdist.core.telemetry.events import Event
from qdist.host.launch.claim import Claim
from qdist.host.launch.local import LocalRanks
from qdist.host.launch.trackers import Tracking
from qdist.host.run import calibration
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import STOP, Ended, RunDir
from qdist.host.run.state import died, log_lengths, lost, note, stuck
from qdist.host.run.watchdog import Watchdog

Show = Callable[[list[Event]], None]


class Ranks(Protocol):
    """The processes of a run, wherever a backend started them. They share the run's directory."""

    def poll(self) -> int | None:
        """The common exit code; None while any process is running, -SIGKILL if they were killed."""

    def stop(self) -> None:
        """Ask the ranks to save after the current step and exit."""

    def kill(self) -> None:
        """Kill all processes at once, without waiting for them."""

    def wait(self) -> int:
        """The common exit code, once all processes have ended."""


Backend = Callable[[Claim], Ranks]
"""Starts the ranks of a claimed run and returns at once. `local.LocalRanks` is the first one."""


def start(
    own: Claim,
    *,
    show: Show,
    say: Callable[[str], None],
    recall: Show | None = None,
    backend: Backend = LocalRanks,
) -> None:
    """Start the ranks of a claimed run and its trackers, and stay until they have ended.

    show: called a few times a second with what the ranks said since.
    recall: called once before, with what they said before the run was resumed.
    say: called with a line for the user.
    Raises KeyboardInterrupt when the run was stopped and saved, JobError when a rank died or the directory was lost.
    """
    run = own.job.run
    with Tracking(run, own.job.plan.spec.trackers, say=say) as tracking:
        attend(
            own, backend, show=show, say=say, recall=recall, look=tracking.look, done=lambda: run.result() is not None
        )
    with contextlib.suppress(OSError):  # a cache that cannot be written to makes no run fail
        calibration.learn(run)


def attend(
    own: Claim,
    backend: Backend,
    *,
    show: Show,
    say: Callable[[str], None],
    done: Callable[[], bool],
    recall: Show | None = None,
    look: Callable[[], None] = lambda: None,
    loses: str = "",
) -> None:
    """Start the ranks of a claimed directory, whatever they do, and stay until they have ended.

    done: whether they have left what they were started for. look: called a few times a second.
    loses: what is told when they are stopped before a first step; empty for what a run says.
    Raises as `start` does.
    """
    run = own.job.run
    follower = Follower(run.path, say=say)
    past = follower.new_events()
    if recall:
        recall(past)
    before = log_lengths(run)
    plan = own.job.plan
    watchdog = Watchdog(run, plan.spec.train.stuck_seconds, ranks=plan.world_size, launch=own.launch)
    ranks = backend(own)
    stopped, hung = _watch(own, ranks, follower, watchdog, look, show, say, loses)
    code = ranks.wait()
    if own.is_lost():
        raise lost(run)
    if done() and code == 0:
        return
    if stopped and not hung and code in (0, -signal.SIGKILL):
        note(run, Ended(state="stopped", time=time.time()))
        raise KeyboardInterrupt
    error = stuck(run, hung) if hung else died(run, before, code)
    note(run, Ended(state="failed", message=error.message, try_=error.try_, time=time.time()))
    raise error


def _watch(
    own: Claim,
    ranks: Ranks,
    follower: Follower,
    watchdog: Watchdog,
    look: Callable[[], None],
    show: Show,
    say: Callable[[str], None],
    loses: str,
) -> tuple[bool, str]:
    """Follow the ranks to their end: whether the user or a scheduler stopped them, and which rank was stuck in what."""
    run, asked, stuck, stepped, answered = own.job.run, 0, "", False, False

    def ask(*_: int | FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            ranks.kill()

    def show_and_note(events: list[Event]) -> None:
        nonlocal stepped
        stepped = stepped or any(event.kind == "step" for event in events)
        show(events)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        readable = True
        while ranks.poll() is None and not own.is_lost():
            wanted = asked
            readable = readable and show_new(follower, show_and_note, say)
            look()
            if wanted and not answered:
                answered = True
                ask_to_stop(run, ranks, say, has_stepped=not loses and (stepped or not readable), loses=loses)
            elif not answered and run.stop_requested():
                answered = True
                say("stopping after this step, with a checkpoint: qdist stop asked for it")
            if stuck := watchdog.stuck():
                break
            time.sleep(0.2)
        if readable and not own.is_lost():
            show_new(follower, show_and_note, say)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        ranks.kill()
        ranks.wait()
        elsewhere = run.stop_requested()  # ranks may have ended before it was seen above
        (run.path / STOP).unlink(missing_ok=True)
    return asked > 0 or elsewhere, stuck


def ask_to_stop(run: RunDir, ranks: Ranks, say: Callable[[str], None], *, has_stepped: bool, loses: str) -> None:
    """Have the ranks save and exit; before their first step there is nothing to save.

    loses: what is told then; empty for what a run says.
    """
    if has_stepped:
        ranks.stop()
        say("stopping after this step, with a checkpoint; a second Ctrl-C stops at once")
    else:
        which = "next" if run.checkpoint_steps() else "first"
        say(loses or f"stopped before the {which} step; nothing to save")
        ranks.kill()


def show_new(follower: Follower, show: Show, say: Callable[[str], None]) -> bool:
    """Show new events; whether they can be read. If not, say so, and the ranks go on unseen."""
    try:
        events = follower.new_events()
    except (RunError, OSError) as error:
        say(f"the run goes on, and is not shown any more: {error}")
        return False
    show(events)
    return True
