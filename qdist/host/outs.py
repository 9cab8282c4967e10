"""Where a command may write: a link is followed, a device or pipe is written to, and neither is ever replaced."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdist.core.errors import JobError, QdistError, RunError
from qdist.host.disk import is_full, obstacle
from qdist.host.files import write_atomic
from qdist.host.opening import node_of

_OTHER = "another --out"


def folder_to_write(out: str) -> str:
    """The place of a folder that is to be written. Raises RunError where something is there, or it cannot be."""
    return _free(out, "a folder")


def file_to_write(out: str) -> str:
    """The place of a file that is to be written and read back. Raises RunError as `folder_to_write` does."""
    return _free(out, "a file")


def stream_to_write(out: str) -> str:
    """The same for what is written once from its beginning to its end: it may go to a device or a pipe."""
    place = _followed(out)
    return str(place) if node_of(place) in ("a device", "a pipe") else _free(out, "a file")


def write_out(out: Path, content: str) -> None:
    """Write a file that may replace one of its name, or go to a device or a pipe. Raises RunError or JobError."""
    place = _followed(str(out))
    with unwritable(out):
        if node_of(place):
            place.write_text(content)
        else:
            write_atomic(place, content)


@contextmanager
def unwritable(out: Path) -> Iterator[None]:
    """What the system refuses to write in this block is a RunError, and a disk that runs full a JobError."""
    try:
        yield
    except OSError as error:
        raise unwritten(out, error) from error


def unwritten(out: Path, error: OSError, *, try_: str = _OTHER) -> QdistError:
    """The error of what could not be written."""
    if is_full(error):
        return JobError(f"no room is left for {out} ({error.strerror})", try_="make room there")
    return RunError(f"{out} cannot be written: {error.strerror}", try_=try_)


def _free(out: str, wanted: str) -> str:
    place = _followed(out)
    node = node_of(place)
    if node and node != "a folder":
        raise RunError(f"{out} is {node}, and {wanted} is to be written", try_=_OTHER)
    if os.path.lexists(place) and (wanted == "a file" or not node or any(place.iterdir())):
        raise RunError(f"{out} exists", try_=_OTHER)
    if why := obstacle(place):
        raise RunError(f"{out} cannot be written: {why}", try_=_OTHER)
    return str(place)


def _followed(out: str) -> Path:
    """Where a link leads, which need not be there."""
    if not os.path.islink(out):
        return Path(out)
    place = Path(os.path.realpath(out))
    if place.is_symlink():
        raise RunError(f"{out} is a link that leads to itself", try_=_OTHER)
    return place
