"""Starts the ranks of a written run on this machine, stays with them, stops them when asked, and says how it ended."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import msgspec

from qdist.core.errors import JobError, RunError
from qdist.core.machine.environment import LAUNCH
from qdist.core.telemetry.events import Event
from qdist.core.text import argument, resuming
from qdist.host import children
from qdist.host.children import killed_by
from qdist.host.files import write_atomic
from qdist.host.launch.claim import Claim
from qdist.host.launch.trackers import Tracking
from qdist.host.run import calibration
from qdist.host.run.follow import Follower
from qdist.host.run.rundir import ENDED, STOP, Ended, RunDir
from qdist.host.run.watchdog import Watchdog


def note(run: RunDir, ended: Ended) -> None:
    """For whoever looks at the run later; a full disk must not hide the error itself."""
    with contextlib.suppress(OSError):
        write_atomic(run.path / ENDED, msgspec.json.format(msgspec.json.encode(ended), indent=1).decode() + "\n")


def stuck(run: RunDir, sentence: str) -> JobError:
    """The error of a run that the launcher ended."""
    return JobError(f"{sentence}; {run.last_saved()}", try_=resuming(run.path))


def lost(run: RunDir) -> JobError:
    """The error of a run whose directory was taken away."""
    return JobError(
        f"{run.path} was removed or moved while it was being trained; its ranks were ended",
        try_="put it back and resume it, or a new run",
    )


def log_lengths(run: RunDir) -> dict[Path, int]:
    """Bytes of each log: what earlier launches said, which is no word of the one to come."""
    return {path: path.stat().st_size for path in run.logs.glob("*.log")}


def died(run: RunDir, before: Mapping[Path, int], code: int) -> JobError:
    """The rank that torch.distributed.run saw die first, why, and the last lines of its log.

    before: what `log_lengths` gave when the ranks were started. The message's first line stands for itself.
    """
    summary = read_new_lines(run.logs / "launcher.log", before)
    root = re.search(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", "\n".join(summary), re.DOTALL)
    if root is None:
        ended = "without finishing the run" if code == 0 else f"with exit code {code}"
        return JobError(f"the ranks ended {ended}:\n{_tail(summary)}", try_=f"read {run.logs}")
    rank, exit_code = int(root[1]), int(root[2])
    path = run.log_file(rank)
    lines = read_new_lines(path, before)
    if exit_code < 0:
        how = killed_by(-exit_code)
    else:
        how = f"ended with exit code {exit_code}" + (f": {why}" if (why := find_reason(lines)) else "")
    advice = [line.removeprefix("  try: ") for line in lines[-3:] if line.startswith("  try: ")]
    hint = resuming(run.path) if run.checkpoint_steps() else f"read {path}"
    last = f"\nthe last lines of {path}:\n{_tail(lines)}" if lines else f"\n{path} has no word of it"
    return JobError(f"rank {rank} {how}{last}", try_=advice[-1] if advice else hint)


def read_new_lines(log: Path, before: Mapping[Path, int]) -> list[str]:
    """The lines of a log behind what it held before; none where there is no log."""
    try:
        with open(log, "rb") as file:
            file.seek(before.get(log, 0))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def find_reason(lines: Sequence[str]) -> str:
    """The error that a rank left with: qdist's own, or the last line of a traceback; empty where there is neither."""
    said = [line.removeprefix("[rank").partition("]: ")[2] if line.startswith("[rank") else line for line in lines]
    for pattern in (r"error: (.+)", r"((?:\w+\.)*\w*(?:Error|Exception)(?:: .*)?)"):
        found = [match[1] for line in said if (match := re.fullmatch(pattern, line))]
        if found:
            return found[-1]
    return ""


def _tail(lines: Sequence[str], count: int = 12) -> str:
    return "\n".join(f"  | {line}" for line in lines[-count:])


Show = Callable[[list[Event]], None]


def start(own: Claim, *, show: Show, say: Callable[[str], None], recall: Show | None = None) -> None:
    """Start the ranks of a run that is claimed, with what tracks it, and stay until they have ended.

    show: called a few times a second with what the ranks said since.
    recall: called once before, with what they said before the run was resumed.
    say: called with a line for the user.
    Raises KeyboardInterrupt when the run was stopped and saved, JobError when a rank died or the directory was lost.
    """
    with Tracking(own.job.run, own.job.plan.spec.trackers, say=say) as tracking:
        _start(own, tracking, show=show, say=say, recall=recall)


def _start(own: Claim, tracking: Tracking, *, show: Show, say: Callable[[str], None], recall: Show | None) -> None:
    run = own.job.run
    follower = Follower(run.path, say=say)
    past = follower.new_events()
    if recall:
        recall(past)
    before = log_lengths(run)
    plan = own.job.plan
    watchdog = Watchdog(run, plan.spec.train.stuck_seconds, ranks=plan.world_size, launch=own.launch)
    with open(run.logs / "launcher.log", "ab") as log:
        ranks = subprocess.Popen(
            ["/bin/sh", argument(run.path / "launch.sh")],
            env={**children.environment(), LAUNCH: own.launch},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(own.lock,),
            preexec_fn=children.ending_with_this(),
        )
    stopped, hung = _watch(own, ranks, follower, watchdog, tracking, show, say)
    if own.is_lost():
        raise lost(run)
    if run.result() is not None and ranks.returncode == 0:
        with contextlib.suppress(OSError):  # a cache that cannot be written to makes no run fail
            calibration.learn(run)
        return
    if stopped and not hung and ranks.returncode in (0, -signal.SIGKILL):
        note(run, Ended(state="stopped", time=time.time()))
        raise KeyboardInterrupt
    error = stuck(run, hung) if hung else died(run, before, ranks.returncode)
    note(run, Ended(state="failed", message=error.message, try_=error.try_, time=time.time()))
    raise error


def _watch(
    own: Claim,
    ranks: subprocess.Popen[bytes],
    follower: Follower,
    watchdog: Watchdog,
    tracking: Tracking,
    show: Show,
    say: Callable[[str], None],
) -> tuple[bool, str]:
    """Follow the ranks to their end: whether the user or a scheduler asked them to stop, and who was stuck in what."""
    run, asked, stuck, stepped, answered = own.job.run, 0, "", False, False

    def ask(*_: int | FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            os.killpg(ranks.pid, signal.SIGKILL)

    def show_and_note(events: list[Event]) -> None:
        nonlocal stepped
        stepped = stepped or any(event.kind == "step" for event in events)
        show(events)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        readable = True
        while ranks.poll() is None and not own.is_lost():
            wanted = asked
            readable = readable and _shown_what_is_new(follower, show_and_note, say)
            tracking.look()
            if wanted and not answered:
                answered = True
                _stop(run, ranks, say, has_stepped=stepped or not readable)
            elif not answered and run.stop_requested():
                answered = True
                say("stopping after this step, with a checkpoint: qdist stop asked for it")
            if stuck := watchdog.stuck():
                break
            time.sleep(0.2)
        if readable and not own.is_lost():
            _shown_what_is_new(follower, show_and_note, say)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if ranks.poll() is None:
            os.killpg(ranks.pid, signal.SIGKILL)
            ranks.wait()
        elsewhere = run.stop_requested()  # ranks may have ended before it was seen above
        (run.path / STOP).unlink(missing_ok=True)
    return asked > 0 or elsewhere, stuck


def _stop(run: RunDir, ranks: subprocess.Popen[bytes], say: Callable[[str], None], *, has_stepped: bool) -> None:
    """Have the ranks save and end; before their first step, when they are still loading, there is nothing to save."""
    if has_stepped:
        (run.path / STOP).touch()
        say("stopping after this step, with a checkpoint; a second Ctrl-C stops at once")
    else:
        which = "next" if run.checkpoint_steps() else "first"
        say(f"stopped before the {which} step; nothing to save")
        os.killpg(ranks.pid, signal.SIGKILL)


def _shown_what_is_new(follower: Follower, show: Show, say: Callable[[str], None]) -> bool:
    """Whether events can be read. Where they cannot, that is said, and the ranks go on unseen."""
    try:
        events = follower.new_events()
    except (RunError, OSError) as error:
        say(f"the run goes on, and is not shown any more: {error}")
        return False
    show(events)
    return True
