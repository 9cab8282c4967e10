"""Is a run planned, running, finished, stopped, failed or killed? From its files and its lock, never from its age."""

import fcntl
import os
import secrets
import socket

import msgspec

from qdist.core.errors import RunError
from qdist.core.telemetry.events import State
from qdist.host.opening import read_typed
from qdist.host.run.rundir import LOCK, RunDir, of_ranks
from qdist.host.run.watchdog import stat_of

_BEGAN = 19
"""Place of a process's start time in what `stat_of` gives: a number is given to another process one day."""


class Holder(msgspec.Struct, frozen=True):
    """The launcher that took a run's lock."""

    pid: int
    host: str
    began: str
    """In the kernel's ticks."""
    launch: str = ""
    """An id that no other launch has; its ranks' beats carry it."""


def state_of(run: RunDir) -> State:
    """planned: never started. killed: its launcher went without a word, and holds the lock no more."""
    if run.result() is not None:
        return "finished"
    if _held(run):
        return "running"
    if run.result() is not None:  # written since the first look, and the lock let go
        return "finished"
    ended = run.ended()
    if ended is not None:
        return ended.state
    return "killed" if of_ranks(run.events, ".jsonl") or of_ranks(run.pulses, ".json") else "planned"


def _held(run: RunDir) -> bool:
    """Whether a launcher, or a rank that it left, holds the run's lock."""
    try:
        descriptor = os.open(run.path / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RunError(f"{run.path / LOCK} cannot be read: {error.strerror}", try_="another --run") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def sign(lock: int) -> str:
    """Write into a run's lock, through its descriptor, who holds it; the id of this launch.

    What starts the ranks holds the lock as well, and may outlive the launcher for a moment.
    """
    stat = stat_of(os.getpid())
    holder = Holder(os.getpid(), socket.gethostname(), stat[_BEGAN] if stat else "", secrets.token_hex(8))
    os.ftruncate(lock, 0)
    os.pwrite(lock, msgspec.json.encode(holder), 0)
    return holder.launch


def launcher_is_gone(run: RunDir) -> bool:
    """Whether the launcher that last took a run's lock was on this machine and is not there any more."""
    holder = _holder(run)
    if holder is None or holder.host != socket.gethostname():
        return False
    stat = stat_of(holder.pid)
    return stat is None or stat[_BEGAN] != holder.began


def is_anothers(run: RunDir, launch: str) -> bool:
    """Whether another launch than `launch` has taken a run since. A lock that cannot be read says of nobody."""
    holder = _holder(run)
    return holder is not None and bool(holder.launch) and holder.launch != launch


def _holder(run: RunDir) -> Holder | None:
    try:
        return read_typed(run.path / LOCK, Holder, RunError)
    except RunError:
        return None
