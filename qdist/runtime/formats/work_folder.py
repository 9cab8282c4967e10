"""A folder that is written completely or not at all; a new process continues from what a killed one finished.

It is built in a hidden folder beside, and renamed at the end. What in that folder has a name with a dot in front is of
the work, not of the result: a mark that says what is being built, records of finished files.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qdist.core.errors import JobError, ModelError, RunError
from qdist.host.files import cache_dir, flush, is_full, locked, sync

_MARK, _WHOLE = ".identity", "whole"


@contextmanager
def built(out: Path, identity: str) -> Iterator[Path]:
    """Where to write what will be at `out`, which exists at the end of the block unless that raised.

    Holds what an earlier process finished of the same, and no file that it left unfinished; of what ended in a
    ModelError nothing is kept.
    identity: says what is written, of everything that decides its bytes; what is left of another is removed.

    Raises RunError if `out` is there, or is being written.
    """
    with reserved(out), filled(out, identity) as work:
        yield work


@contextmanager
def reserved(out: Path) -> Iterator[None]:
    """Keep other processes away from `out`. Raises RunError if one is at work or `out` exists; an empty folder goes."""
    with _told(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(_lock(out), busy=f"another process is writing {out}"))
        except RunError as error:
            raise RunError(error.message, try_="wait for it to end, or another --out") from None
        if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
            out.rmdir()
        if os.path.lexists(out):
            raise RunError(f"{out} exists", try_="another --out")
        yield


@contextmanager
def filled(out: Path, identity: str) -> Iterator[Path]:
    """`built` for a folder that is already reserved."""
    with _told(out):
        work = _work_folder(out, identity)
    try:
        with _told(out, work):
            yield work
    except BaseException as error:
        # A model that cannot be written will not be the next time either; and what is unfinished helps nobody.
        if isinstance(error, ModelError) or not _holds_anything(work):
            shutil.rmtree(work)
        raise
    with _told(out, work):
        flush(work)
    _lock(out).write_text(_WHOLE)
    for path in work.glob(".*"):
        path.unlink()
    os.rename(work, out)
    sync(out.parent)


def _lock(out: Path) -> Path:
    """The lock file held while `out` is written; says `_WHOLE` once the work's own files may be removed."""
    return cache_dir() / f".out-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]}.lock"


@contextmanager
def _told(out: Path, inside: Path | None = None) -> Iterator[None]:
    """Raise clear errors for an unwritable folder or a disk that another program has filled.

    inside: where files are written; errors of others are left as they are.
    """
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise JobError(
                f"no room is left for {out} ({error.strerror}). What is finished stays, and the same command goes on "
                "from it",
                try_="make room there",
            ) from error
        place = Path(str(error.filename2 or error.filename))
        if inside is not None and not place.is_relative_to(inside):
            raise  # of a file that is read
        raise RunError(f"{out} cannot be written: {error.strerror}: {place}", try_="another --out") from error


def _holds_anything(work: Path) -> bool:
    return any(path.name != _MARK and path.suffix != ".unfinished" for path in work.iterdir())


def _work_folder(out: Path, identity: str) -> Path:
    work = out.with_name(f".{out.name}.unfinished")
    mark = work / _MARK
    if work.is_dir() and not mark.is_file() and _lock(out).read_bytes() == _WHOLE.encode():
        shutil.rmtree(work)  # killed a moment before it would have been renamed
    _lock(out).write_text("")
    if work.is_dir() and not mark.is_file() and any(work.iterdir()):
        raise RunError(f"{work} is in the way, and not what qdist left unfinished", try_="another --out")
    if work.is_dir() and mark.is_file() and mark.read_bytes() != identity.encode():
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    mark.write_text(identity)
    for leftover in work.glob(".*.unfinished"):
        leftover.unlink()
    return work
