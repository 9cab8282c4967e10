"""Files as their bytes are once decompressed: gzip, bzip2 and xz, and zstd where Python has it."""

import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qdist.core.errors import DataError
from qdist.host.opening import readable, told


class Compression(NamedTuple):
    """How a file may be compressed."""

    magic: bytes
    name: str
    suffix: str
    unpack: str
    """Program that decompresses it."""
    module: str
    """Module of Python that reads it."""


COMPRESSIONS = (
    Compression(b"\x1f\x8b", "gzip", ".gz", "gunzip", "gzip"),
    Compression(b"\x28\xb5\x2f\xfd", "zstd", ".zst", "unzstd", "compression.zstd"),
    Compression(b"\xfd7zXZ\x00", "xz", ".xz", "unxz", "lzma"),
    Compression(b"BZh", "bzip2", ".bz2", "bunzip2", "bz2"),
)


def compression_of(path: Path) -> Compression | None:
    """How a file is compressed, told by its first bytes; None if it is not. Raises DataError if it cannot be read."""
    with readable(path, DataError), path.open("rb") as file:
        head = file.read(8)
    return next((each for each in COMPRESSIONS if head.startswith(each.magic)), None)


def can_read(compression: Compression) -> bool:
    """Whether this Python decompresses it: zstd only from 3.14."""
    package, _, inner = compression.module.partition(".")
    return find_spec(package) is not None and (not inner or find_spec(compression.module) is not None)


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO | io.BufferedReader]:
    """A file as a stream of its decompressed bytes. Raises DataError for one that cannot be read or is damaged."""
    compression = compression_of(path)
    if compression is None:
        with readable(path, DataError), path.open("rb") as file:
            yield file
        return
    decompressor: Any = importlib.import_module(compression.module)
    damaged = f"{path} is damaged: {compression.name} cannot decompress it"
    with decompressor.open(path, "rb") as stream, io.BufferedReader(_Decompressed(stream, damaged)) as found:
        yield found


class _Decompressed(io.RawIOBase):
    """A decompressing stream whose errors are DataErrors, so that they are told from those of whoever reads it."""

    def __init__(self, stream: BinaryIO, damaged: str) -> None:
        self._stream, self._damaged = stream, damaged

    def readable(self) -> bool:
        """As io has it."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as there are bytes, and give their number."""
        with told(self._damaged, DataError, try_="fetch it again"):
            found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def bare_name(path: Path) -> Path:
    """A path without the suffix of its compression: 'a.jsonl' of 'a.jsonl.gz'."""
    return path.with_suffix("") if path.suffix.lower() in {each.suffix for each in COMPRESSIONS} else path
