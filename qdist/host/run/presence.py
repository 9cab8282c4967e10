"""Whether an agent or a launcher of a run is at work, by the locks that they hold in the run directory."""

import fcntl
import os
from pathlib import Path

from qdist.core.errors import RunError
from qdist.host.run.rundir import RunDir


def lock_of(run: RunDir, node: int) -> Path:
    """The file that the agent of a node holds locked while it works; a shared directory has one for each node."""
    return run.path / f"agent{node:03d}.lock"


def agent_is_here(run: RunDir) -> bool:
    """Whether an agent works in this run directory, of this node or of another that shares it."""
    return any(map(is_held, sorted(run.path.glob("agent*.lock"))))


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RunError(f"{lock} cannot be read: {error.strerror}", try_="another --run") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
