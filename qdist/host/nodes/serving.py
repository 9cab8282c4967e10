"""How are the files of a run's directory listed, read and written for another node?"""

import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from qdist.core.errors import RunError
from qdist.core.telemetry.events import whole_length
from qdist.host.files import replace_folder, replacing
from qdist.host.nodes.wire import Wire
from qdist.host.nodes.words import MOST_BYTES, Ask, Listed, Reply

_MOST_FILES = 50_000
_TAIL_BYTES = 1 << 16


def serve_files(wire: Wire, first: Ask, folder: Path, who: Mapping[str, str]) -> None:
    """Answer requests until the other side closes the connection.

    first: the request that has been read already. who: the `run` and `name` for 'hello'.
    """
    ask = first
    while True:
        try:
            _answer(wire, ask, folder, who)
        except FileNotFoundError:
            _refuse(wire, Reply(error=f"{ask.path} does not exist", missing=True))
        except RunError as error:
            _refuse(wire, Reply(error=error.message))
        except ConnectionError:
            return
        except OSError as error:
            _refuse(wire, Reply(error=f"{ask.path}: {error.strerror or error}"))
        ask = wire.receive(Ask)


def _refuse(wire: Wire, reply: Reply) -> None:
    wire.drain()
    wire.send(reply)


def _answer(wire: Wire, ask: Ask, folder: Path, who: Mapping[str, str]) -> None:
    match ask.verb:
        case "hello":
            wire.send(Reply(run=who.get("run", ""), name=who.get("name", "")))
        case "list":
            found = msgspec.json.encode(Listed(list_files(folder, ask.path)))
            wire.send(Reply(body=len(found)), found)
        case "get":
            _get(wire, ask, place_in(folder, ask.path))
        case "append":
            wire.expect(ask.size)
            _append(wire, ask, place_in(folder, ask.path))
        case "put":
            wire.expect(ask.size)
            _put(wire, ask, place_in(folder, ask.path))
        case "publish":
            _publish(place_in(folder, ask.path), place_in(folder, ask.to))
            wire.send(Reply())
        case _:
            raise RunError(f"{ask.verb} is not possible after a request for files")


def place_in(folder: Path, path: str) -> Path:
    """The place of a relative path in a folder. Raises RunError if it leads out of it or over a link."""
    parts = path.split("/")
    if len(path) > 1000 or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise RunError(f"{path[:100]!r} is not a path inside the run directory")
    place = folder
    for part in parts:
        place = place / part
        if place.is_symlink():
            raise RunError(f"{path} leads over a link")
    return place


def list_files(folder: Path, below: str) -> dict[str, int]:
    """Regular files by relative path, with their sizes; nothing where `below` is not a folder."""
    found: dict[str, int] = {}
    for root, _, names in os.walk(place_in(folder, below) if below else folder):
        for path in (Path(root, name) for name in sorted(names)):
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                found[str(path.relative_to(folder))] = status.st_size
        if len(found) > _MOST_FILES:
            raise RunError(f"there are more than {_MOST_FILES:,} files")
    return found


def _open(place: Path, flags: int) -> BinaryIO:
    """Open a regular file. Raises RunError for anything else: a pipe would wait for ever."""
    descriptor = os.open(place, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RunError(f"{place.name} is not a file")
    return os.fdopen(descriptor, "r+b" if flags & os.O_RDWR else "rb", buffering=0)


def _get(wire: Wire, ask: Ask, place: Path) -> None:
    with _open(place, os.O_RDONLY) as file:
        size = os.fstat(file.fileno()).st_size
        rest = max(0, size - ask.offset)
        count = rest if ask.length is None else min(rest, max(0, ask.length))
        wire.send(Reply(size=size, body=count))
        wire.send_file(file, ask.offset, count)


def _append(wire: Wire, ask: Ask, place: Path) -> None:
    """Nothing is written before all of it is here, and nothing if the file has another size than the sender thinks."""
    if ask.size > MOST_BYTES:
        raise RunError(f"{ask.size:,} bytes at once; {MOST_BYTES:,} are possible")
    data = b"".join(wire.blocks())
    with opened_to_append(place) as (file, size):
        if size == ask.offset:
            add(file, size, data)
            size += len(data)
    wire.send(Reply(size=size))


@contextmanager
def opened_to_append(place: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A file, locked, and its size. Half a line of events, which a kill within a write leaves, is cut off first."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with _open(place, os.O_RDWR | os.O_CREAT) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file, _without_half_line(file) if place.suffix == ".jsonl" else os.fstat(file.fileno()).st_size


def add(file: BinaryIO, size: int, data: bytes) -> None:
    """Write all of `data` at the end of a file of `size` bytes, or nothing: a full disk leaves no half line."""
    rest = memoryview(data)
    try:
        file.seek(size)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(size)
        raise


def _without_half_line(file: BinaryIO) -> int:
    size = file.seek(0, os.SEEK_END)
    start, whole = size, 0
    while start and not whole:
        start = max(0, start - _TAIL_BYTES)
        file.seek(start)
        whole = whole_length(file.read(_TAIL_BYTES))
    if start + whole < size:
        file.truncate(start + whole)
    return start + whole


def _put(wire: Wire, ask: Ask, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if ask.flush:
        with replacing(place) as (descriptor, _), open(descriptor, "wb", closefd=False) as file:
            file.writelines(wire.blocks())
    elif ask.size <= MOST_BYTES:
        beside = place.with_suffix(".new")  # the same each time: none are left by kills
        beside.write_bytes(b"".join(wire.blocks()))
        os.replace(beside, place)
    else:
        raise RunError(f"{ask.size:,} bytes without flushing; {MOST_BYTES:,} are possible")
    wire.send(Reply(size=ask.size))


def _publish(beside: Path, final: Path) -> None:
    if not beside.is_dir():
        raise FileNotFoundError(beside)
    replace_folder(beside, final, aside=beside.with_name(f"{beside.name}.old"))
