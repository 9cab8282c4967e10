"""Records from standard input, kept as a file: data are read more than once, and again when a run is resumed."""

import hashlib
import os
import sys

from msgspec.structs import replace

from qdist.core.data.sources import STDIN, SourcePart, written
from qdist.core.errors import DataError, SpecError
from qdist.core.spec.sections import Data
from qdist.host.data.sources import split_sources
from qdist.host.files import cache_dir, replacing

_CHUNK = 1 << 20


def kept(data: Data) -> Data:
    """The data with a file in the cache in place of standard input, which is read to its end; others as they are.

    Raises SpecError if it is named twice, or is a terminal; DataError if it is empty.
    """
    trained, evaluated = split_sources(data.path), split_sources(data.eval or "")
    count = [part.path for part in (*trained, *evaluated)].count(STDIN)
    if not count:
        return data
    if count > 1:
        raise SpecError(f"standard input ({STDIN}) can be read once, not {count} times", try_="a file for the others")
    path = _written()
    return replace(
        data,
        path=written(_with_path(trained, path)),
        eval=None if data.eval is None else written(_with_path(evaluated, path)),
    )


def _with_path(parts: tuple[SourcePart, ...], path: str) -> tuple[SourcePart, ...]:
    return tuple(replace(part, path=path) if part.path == STDIN else part for part in parts)


def _written() -> str:
    """The file that standard input was written to, named for its contents."""
    if sys.stdin.isatty():
        raise SpecError("standard input is a terminal, and no data come from it", try_="zcat FILE | qdist launch ...")
    folder, digest, size = cache_dir("stdin"), hashlib.sha256(), 0
    latest = folder / f"latest-{os.getpid()}"
    with replacing(latest) as (descriptor, _), open(descriptor, "wb", closefd=False) as file:
        while chunk := sys.stdin.buffer.read(_CHUNK):
            digest.update(chunk)
            size += file.write(chunk)
    if not size:
        latest.unlink()
        raise DataError("standard input holds no record (0 bytes)", try_="a command before the | that writes records")
    path = folder / f"stdin-{digest.hexdigest()[:16]}"
    os.replace(latest, path)
    return str(path)
