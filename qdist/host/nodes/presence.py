"""Whether an agent of a run is at work, by the lock that it holds in the run directory."""

import fcntl
import os
from pathlib import Path

from qdist.host.run.rundir import RunDir


def lock_of(run: RunDir, node: int) -> Path:
    """The file that the agent of a node holds locked while it works; a shared directory has one for each node."""
    return run.path / f"agent{node:03d}.lock"


def agent_is_here(run: RunDir) -> bool:
    """Whether an agent works in this run directory, of this node or of another that shares it."""
    return any(map(_is_held, sorted(run.path.glob("agent*.lock"))))


def _is_held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
