"""Can a folder be written to, and has its disk room? Asked before anything is made that would then be lost."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdist.core.errors import JobError, PlanError
from qdist.core.units import format_bytes

_BROKEN = (errno.EROFS, errno.EIO, errno.ESTALE)
"""What a disk answers with that went away while it was written to: remounted for reading, broken, on a lost server."""


def obstacle(folder: Path, *, probe: bool = False) -> str:
    """Why a folder cannot be written, or made where it is not there; empty where nothing is known against it.

    probe: make a file there, without a name where the disk can. Permissions alone do not tell of a quota, nor root of
    anything.
    """
    there = nearest(folder)
    if not there.is_dir():
        kind = "a file" if there.exists() else "a link to nothing"
        return f"it is {kind}" if there == folder else f"{there} is {kind}"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"you may not write to {there}"
    if probe:
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            return f"{error.strerror}: {there}"
    return ""


def is_full(error: OSError) -> bool:
    """Whether a disk, or a user's share of it, has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def nearest(path: Path) -> Path:
    """The path itself, or the innermost of its parents that is there."""
    return next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder, which need not be there."""
    return shutil.disk_usage(nearest(folder)).free


def require_space(folder: Path, needed_bytes: int, *, purpose: str, try_: str = "--out on another disk") -> None:
    """Raise PlanError where the disk of a folder has less room. purpose: such as 'quantizing llama-7b'."""
    free = free_bytes(folder)
    if needed_bytes > free:
        raise PlanError(
            f"{purpose} needs {format_bytes(needed_bytes)} in {folder}, which has {format_bytes(free)} free: "
            f"{format_bytes(needed_bytes - free)} are missing",
            try_=try_,
        )


@contextmanager
def told_of_disks() -> Iterator[None]:
    """Raise JobError where a disk that was looked at before is full or gone by now; other errors stay as they are."""
    try:
        yield
    except OSError as error:
        if not is_full(error) and error.errno not in _BROKEN:
            raise
        where = f": {error.filename}" if error.filename else ""
        again = "then the same command again, or `qdist launch --resume` of a run"
        raise JobError(
            f"a disk cannot be written to ({error.strerror}{where})",
            try_=f"make room there, {again}" if is_full(error) else f"have it mounted for writing, {again}",
        ) from error
