"""A run's state and how a launch of it ended: as a word, as an error, and as a file for later."""

import contextlib
import os
import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from qdist.core.errors import JobError, RunError
from qdist.core.telemetry.events import State
from qdist.core.text import resuming
from qdist.host.children import killed_by
from qdist.host.files import write_atomic
from qdist.host.opening import read_typed
from qdist.host.run.presence import agent_is_here, is_held
from qdist.host.run.rundir import ENDED, LOCK, Ended, RunDir, of_ranks
from qdist.host.run.watchdog import stat_of

_BEGAN = 19
"""Index of a process's start time in `stat_of`; it tells a process from a later one with the same id."""


class Holder(msgspec.Struct, frozen=True):
    """The launcher that holds a run's lock."""

    pid: int
    host: str
    began: str
    """Start time of its process, in the kernel's ticks."""
    launch: str = ""
    """Unique id of the launch, which its ranks' heartbeats carry."""


def state_of(run: RunDir) -> State:
    """The run's state. planned: never started. killed: its launcher recorded no reason and no longer holds the lock.

    A run of several nodes is running wherever an agent takes part in it.
    """
    if run.result() is not None:
        return "finished"
    if is_held(run.path / LOCK) or agent_is_here(run):  # a rank that outlived its launcher holds the lock as well
        return "running"
    if run.result() is not None:  # written since the first look, and the lock let go
        return "finished"
    ended = run.ended()
    if ended is not None:
        return ended.state
    return "killed" if of_ranks(run.events, ".jsonl") or of_ranks(run.pulses, ".json") else "planned"


def sign(lock: int) -> str:
    """Record in a run's lock file, through its descriptor, who holds it; returns the launch's id.

    What starts the ranks holds the lock as well, and may outlive the launcher for a moment.
    """
    stat = stat_of(os.getpid())
    holder = Holder(os.getpid(), socket.gethostname(), stat[_BEGAN] if stat else "", secrets.token_hex(8))
    os.ftruncate(lock, 0)
    os.pwrite(lock, msgspec.json.encode(holder), 0)
    return holder.launch


def launcher_is_gone(run: RunDir) -> bool:
    """Whether the launcher that last locked a run was on this machine and has exited."""
    holder = _holder(run)
    if holder is None or holder.host != socket.gethostname():
        return False
    stat = stat_of(holder.pid)
    return stat is None or stat[_BEGAN] != holder.began


def is_anothers(run: RunDir, launch: str) -> bool:
    """Whether a launch other than `launch` has locked a run since. An unreadable lock counts as no."""
    holder = _holder(run)
    return holder is not None and bool(holder.launch) and holder.launch != launch


def _holder(run: RunDir) -> Holder | None:
    try:
        return read_typed(run.path / LOCK, Holder, RunError)
    except RunError:
        return None


def note(run: RunDir, ended: Ended) -> None:
    """Record for later how a run ended; a full disk must not hide the error itself."""
    with contextlib.suppress(OSError):
        write_atomic(run.path / ENDED, msgspec.json.format(msgspec.json.encode(ended), indent=1).decode() + "\n")


def stuck(run: RunDir, sentence: str) -> JobError:
    """The error for a run that the launcher killed."""
    return JobError(f"{sentence}; {run.last_saved()}", try_=resuming(run.path))


def lost(run: RunDir) -> JobError:
    """The error for a run whose directory was removed."""
    return JobError(
        f"{run.path} was removed or moved while it was being trained; its ranks were ended",
        try_="put it back and resume it, or a new run",
    )


def log_lengths(run: RunDir) -> dict[Path, int]:
    """Bytes of each log from earlier launches, to be skipped when reading the next one's."""
    return {path: path.stat().st_size for path in run.logs.glob("*.log")}


def died(run: RunDir, before: Mapping[Path, int], code: int) -> JobError:
    """The error for the rank that its agent saw fail first, with the reason and its log's last lines.

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
    last = f"\nthe last lines of {path}:\n{_tail(lines)}" if lines else f"\n{path} says nothing about it"
    return JobError(f"rank {rank} {how}{last}", try_=advice[-1] if advice else hint)


def read_new_lines(log: Path, before: Mapping[Path, int]) -> list[str]:
    """The lines added to a log since it had its length in `before`; none if there is no log."""
    try:
        with open(log, "rb") as file:
            file.seek(before.get(log, 0))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def find_reason(lines: Sequence[str]) -> str:
    """The error that a rank exited with: qdist's own, or a traceback's last line; empty if there is neither."""
    said = [line.removeprefix("[rank").partition("]: ")[2] if line.startswith("[rank") else line for line in lines]
    for pattern in (r"error: (.+)", r"((?:\w+\.)*\w*(?:Error|Exception)(?:: .*)?)"):
        found = [match[1] for line in said if (match := re.fullmatch(pattern, line))]
        if found:
            return found[-1]
    return ""


def _tail(lines: Sequence[str], count: int = 12) -> str:
    return "\n".join(f"  | {line}" for line in lines[-count:])
