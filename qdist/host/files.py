"""Atomic file writes, checks that a path is writable and the disk has room, and qdist's caches."""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdist.core.errors import JobError, MachineError, PlanError, QdistError, RunError
from qdist.core.text import format_bytes
from qdist.host.opening import node_of

BESIDE = r"\..+\.[a-z0-9_]{8}\.tmp"
"""Regular expression for the names of temporary files that `replacing` is still writing."""


def write_atomic(path: Path, content: bytes | str, *, inside: Path | None = None) -> None:
    """Write to a temporary file, flush it and rename: readers see the old file or the new one, never a partial one.

    inside: the folder of the same disk where it is written; by default that of `path`.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path, inside=inside) as (descriptor, _), open(descriptor, "wb", closefd=False) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, *, inside: Path | None = None) -> Iterator[tuple[int, Path]]:
    """A temporary file, as an open descriptor and a path, that replaces `path` at the end unless the block raised.

    It is flushed to disk first. Temporary files that killed processes left in the folder are removed.
    inside: as for `write_atomic`.
    """
    folder = inside or path.parent
    sweep(folder)
    descriptor, beside = _beside(folder, path.name)
    try:
        yield descriptor, Path(beside)
        os.fsync(descriptor)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove temporary files that a killed `replacing` left in a folder.

    Other files stay, and so do those still being written, which their writers have locked.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for name in names:
        if re.fullmatch(BESIDE, name):
            with contextlib.suppress(OSError):  # another process was faster, or it is another user's
                descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(folder / name)
                finally:
                    os.close(descriptor)


def _beside(folder: Path, wanted: str) -> tuple[int, str]:
    """Create and lock a temporary file for contents that will get the name `wanted`: its descriptor and name."""
    while True:
        name = str(folder / f".{wanted}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(name):  # nobody swept it before it was locked
            return descriptor, name
        os.close(descriptor)


def publish_folder(beside: Path, final: Path) -> None:
    """Flush a finished folder's files and rename it into place. `final` must not exist."""
    flush(beside)
    os.rename(beside, final)
    sync(final.parent)


def replace_folder(beside: Path, final: Path, *, aside: Path) -> None:
    """Publish a folder in place of another, which is removed: at every moment one of the two is at `final`.

    aside: where the old one lies for a moment on a disk that cannot exchange two names (NFS): only there `final` is
    missing in between, and a process killed just then leaves the old one at `aside`.
    """
    if not final.exists():
        publish_folder(beside, final)
        return
    flush(beside)
    if _exchange(beside, final):
        old = beside
    else:
        os.rename(final, aside)
        os.rename(beside, final)
        old = aside
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux, renameat2); whether the kernel and the disk support it."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return bool(renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0)


def flush(beside: Path) -> None:
    """Flush a folder's files and names to disk, readable as the umask allows."""
    mode = umasked(0o666)
    for file in [path for path in beside.rglob("*") if path.is_file()]:
        file.chmod(mode)  # safetensors writes 0600, and adapters are made to be shared
        sync(file)
    sync(beside)


def umasked(mode: int) -> int:
    """The mode that a file created with `mode` gets from this process's umask."""
    try:
        # Asking the system sets it as well, for all threads.
        status = Path("/proc/self/status").read_text()
        mask = int(status.partition("\nUmask:")[2].split(maxsplit=1)[0], 8)
    except (OSError, IndexError):
        mask = os.umask(0o077)
        os.umask(mask)
    return mode & ~mask


def cache_path() -> Path:
    """`$QDIST_CACHE`, else `qdist` in the user's cache folder; it need not exist."""
    explicit = os.environ.get("QDIST_CACHE")
    return Path(explicit) if explicit else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdist"


def cache_dir(*inner: str) -> Path:
    """The cache or a folder in it, created if missing. Raises MachineError if it cannot be created."""
    folder = cache_path().joinpath(*inner)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable_cache(error.strerror or str(error)) from error
    return folder


def unusable_cache(why: str) -> MachineError:
    """The error for a cache that cannot be used."""
    return MachineError(
        f"the cache {cache_path()} cannot be written: {why}", try_="QDIST_CACHE=FOLDER, one that you may write to"
    )


@contextmanager
def locked(path: Path, *, busy: str = "") -> Iterator[int]:
    """Hold an exclusive lock on a file; it ends with the process, however that ends. Yields its descriptor.

    busy: the message of the RunError raised when another process holds it; empty waits instead.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not busy:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        elif not _locks(descriptor):
            raise RunError(busy, try_="wait for it to end, or choose another --run")
        yield descriptor
    finally:
        os.close(descriptor)


def _locks(descriptor: int, *, attempts: int = 5) -> bool:
    """Try for a moment: a process that only checks whether the lock is held holds it for that long."""
    for attempt in range(attempts):
        if attempt:
            time.sleep(0.05)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return True
    return False


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_BROKEN = (errno.EROFS, errno.EIO, errno.ESTALE)
"""Errors from a disk that failed during a write: remounted read-only, broken, or on a lost server."""


def obstacle(folder: Path, *, probe: bool = False) -> str:
    """Why a folder cannot be written, or created if missing; empty if no obstacle is known.

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
    """Whether a disk, or a user's quota on it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def nearest(path: Path) -> Path:
    """The path itself, or its innermost parent that exists."""
    return next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist."""
    return shutil.disk_usage(nearest(folder)).free


def require_space(folder: Path, needed_bytes: int, *, purpose: str, try_: str = "--out on another disk") -> None:
    """Raise PlanError if the disk of a folder has less room. purpose: such as 'quantizing llama-7b'."""
    free = free_bytes(folder)
    if needed_bytes > free:
        raise PlanError(
            f"{purpose} needs {format_bytes(needed_bytes)} in {folder}, which has {format_bytes(free)} free: "
            f"{format_bytes(needed_bytes - free)} are missing",
            try_=try_,
        )


@contextmanager
def told_of_disks() -> Iterator[None]:
    """Raise JobError if a disk that was checked before has filled up or gone; other errors pass through."""
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


_OTHER = "another --out"


def folder_to_write(out: str) -> str:
    """The path of a folder to be written. Raises RunError if something exists there or it cannot be created."""
    return _free(out, "a folder")


def file_to_write(out: str) -> str:
    """The path of a file to be written and read back. Raises RunError as `folder_to_write` does."""
    return _free(out, "a file")


def stream_to_write(out: str) -> str:
    """The path of a file written once from beginning to end, which may be a device or a pipe."""
    place = _followed(out)
    return str(place) if node_of(place) in ("a device", "a pipe") else _free(out, "a file")


def write_out(out: Path, content: str) -> None:
    """Write a file that may replace an existing one, or be a device or a pipe. Raises RunError or JobError."""
    place = _followed(str(out))
    with unwritable(out):
        if node_of(place):
            place.write_text(content)
        else:
            write_atomic(place, content)


@contextmanager
def unwritable(out: Path) -> Iterator[None]:
    """Raise RunError for writes that the system refuses in this block, and JobError for a full disk."""
    try:
        yield
    except OSError as error:
        raise unwritten(out, error) from error


def unwritten(out: Path, error: OSError, *, try_: str = _OTHER) -> QdistError:
    """The error for output that could not be written."""
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
    """The target of a link, which need not exist."""
    if not os.path.islink(out):
        return Path(out)
    place = Path(os.path.realpath(out))
    if place.is_symlink():
        raise RunError(f"{out} is a link that leads to itself", try_=_OTHER)
    return place
