"""Is a run planned, running, finished, stopped, failed or killed? From its files and its lock, never from its age."""

import fcntl
import os

from qdist.core.events import State
from qdist.host.rundir import LOCK, RunDir


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
    return "killed" if any(run.events.glob("rank*.jsonl")) or any(run.pulses.glob("rank*.json")) else "planned"


def _held(run: RunDir) -> bool:
    """Whether a launcher, or a rank that it left, holds the run's lock."""
    try:
        descriptor = os.open(run.path / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
