"""Can an agent work in its run directory, and what did an earlier launch leave there?"""

import time
from pathlib import Path

from qdist.core.errors import JobError, RunError
from qdist.core.text import resuming
from qdist.host.run.rundir import STOP, RunDir

_STALE_S = 60.0
"""Age of a request to stop that cannot be meant for an agent which begins now; more than starting it takes."""


def require_folder(run: Path) -> None:
    """Create the run directory if it is missing. Raises RunError where that cannot be."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{run} cannot be written: {error.strerror}", try_=f"another --run than {resuming(run)}"
        ) from None


def forget_old_stop(run: RunDir) -> None:
    """Remove a request to stop an earlier launch that was killed before it could heed it; nobody may be at work here.

    Otherwise this launch, and on a disk of its own every later one, would end at once.
    """
    try:
        asked = (run.path / STOP).stat().st_mtime
    except FileNotFoundError:
        return
    if time.time() - asked > _STALE_S:
        (run.path / STOP).unlink(missing_ok=True)


def unusable(name: str, run: Path, error: OSError) -> JobError:
    """The error of a node whose disk fails, as a full one does. name: of the node."""
    where = error.filename or run
    return JobError(
        f"{name}: {where} cannot be used: {error.strerror or error}", try_=f"make room on {name}, or look at its disk"
    )
