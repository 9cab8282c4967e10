"""The text of a data file: its encoding, its lines, and the position of a byte that is not text."""

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import NamedTuple, TextIO

from qdist.core.errors import DataError
from qdist.host.opening import UTF8, encoding_of, readable


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A file as text, with lines ending only at newlines: U+2028 and similar may occur inside a JSON string.

    Raises DataError for what cannot be read or is not text in its encoding.
    """
    with readable(path, DataError):
        with path.open("rb") as file:
            encoding = encoding_of(file.read(4))
        with path.open(encoding=encoding, newline="\n") as stream:
            try:
                yield stream
            except UnicodeDecodeError as error:
                raise _undecodable(path, encoding, error.reason) from error


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file with their newlines, read lazily."""
    with open_text(path) as stream:
        yield from stream


def beside(path: Path, infix: str) -> str:
    """Shell-quoted name for a repaired copy of a file: 'my data.csv' and 'utf8' give "'my data.utf8.csv'"."""
    return quote(str(path.with_name(f"{path.stem}.{infix}{path.suffix}")))


def from_encoding(path: Path, encoding: str) -> str:
    """A command that writes a UTF-8 copy of a file next to the one in another encoding."""
    return f"iconv -f {encoding} -t UTF-8 {quote(str(path))} > {beside(path, 'utf8')}"


class _Fault(NamedTuple):
    """The first byte of a file that is not UTF-8."""

    position: int
    """Offset of the byte in the file."""
    line: int
    byte: int
    after_utf8: bool
    """Whether multi-byte characters precede it, so that the file is UTF-8 with a damaged spot."""


def _undecodable(path: Path, encoding: str, reason: str) -> DataError:
    fault = _fault(path) if encoding == UTF8 else None
    if fault is None:
        return DataError(f"{path} starts as {encoding.upper()} but is damaged: {reason}", try_="write the file again")
    told = f"{path} is not UTF-8: byte 0x{fault.byte:02x} at position {fault.position}, in line {fault.line}"
    if fault.after_utf8:
        drop = f"iconv -c -f UTF-8 -t UTF-8 {quote(str(path))} > {beside(path, 'utf8')}"
        return DataError(f"{told}, though the text before it is; iconv -c leaves out such bytes", try_=drop)
    guess = "WINDOWS-1252" if _is_windows_1252(path) else "ISO-8859-1"
    return DataError(f"{told}, perhaps {guess}", try_=from_encoding(path, guess))


def _fault(path: Path) -> _Fault | None:
    before, after_utf8 = 0, False
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                after_utf8 |= not raw[: error.start].isascii()
                return _Fault(before + error.start, number, raw[error.start], after_utf8)
            before += len(raw)
            after_utf8 |= not raw.removeprefix(codecs.BOM_UTF8).isascii()
    return None


def _is_windows_1252(path: Path) -> bool:
    """Whether every byte is a character in Windows-1252; in ISO-8859-1 every byte is, but quotes and dashes differ."""
    with path.open("rb") as stream:
        try:
            while chunk := stream.read(1 << 20):
                chunk.decode("cp1252")
        except UnicodeDecodeError:
            return False
    return True


Record = dict[str, object]
Located = tuple[str, Record | DataError]
"""'file.jsonl:17' or 'file.json, record 3', and the record there or the error about it."""

FIELDS = frozenset((
    "messages", "conversations", "conversation", "instances", "instruction", "input", "output", "prompt", "completion",
    "question", "answer", "response", "chosen", "text",
))  # fmt: skip
"""Field names that identify a record or a table header when the file's suffix does not."""
