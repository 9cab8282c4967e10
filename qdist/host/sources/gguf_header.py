"""Reads the header of a GGUF file without torch: keys, and names of tensors.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

from qdist.core.errors import ModelError
from qdist.core.model.families import config_of_header
from qdist.host.opening import readable, require_file, told

MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct format characters of the number types."""
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_AGAIN = "download the file again"


class Header(NamedTuple):
    """The header of one GGUF file."""

    metadata: dict[str, Any]
    """Values of the scalar keys."""
    lengths: dict[str, int]
    """Lengths of the array keys."""
    tensors: tuple[str, ...]


def is_gguf(path: Path) -> bool:
    """Whether a file starts with the GGUF magic."""
    require_file(path, ModelError, try_=_AGAIN)
    with readable(path, ModelError), open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def parts_of(path: Path) -> tuple[Path, ...]:
    """All files of a model that llama.cpp has split, in order; only the file itself if it is not split.

    Raises ModelError for a part that is not the first, or where a part is missing.
    """
    found = _PART.search(path.name)
    if not found:
        return (path,)
    stem, count = path.name[: found.start()], int(found[2])
    names = [f"{stem}-{number:05d}-of-{count:05d}{path.suffix}" for number in range(1, count + 1)]
    if int(found[1]) != 1:
        raise ModelError(f"{path} is part {int(found[1])} of {count}", try_=str(path.with_name(names[0])))
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        raise ModelError(f"{path} is the first of {count} parts; {missing[0]} is not beside it", try_=_AGAIN)
    return tuple(path.with_name(name) for name in names)


def read_config(path: Path) -> dict[str, Any]:
    """A model's shape as a config.json. Raises ModelError if the file is not GGUF, damaged or unknown."""
    first, *others = map(read_header, parts_of(path))
    tensors = {tensor for header in (first, *others) for tensor in header.tensors}
    return config_of_header(first.metadata, first.lengths, tensors, name=str(path))


def read_header(path: Path) -> Header:
    """The header of a file. Raises ModelError if it is not a GGUF file, or is cut off within its header."""
    if not is_gguf(path):
        raise ModelError(f"{path} is not a GGUF file: it does not begin with GGUF", try_=_AGAIN)
    with (
        told(f"{path} is cut short or damaged, its header cannot be read", ModelError, try_=_AGAIN),
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return _Reader(content).header()


class _Reader:
    """Reads a header sequentially from its first byte."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at = content, len(MAGIC)

    def header(self) -> Header:
        version = self._number("I")
        if version not in (2, 3):
            raise KeyError(version)
        tensors, keys = self._number("Q"), self._number("Q")
        metadata, lengths = dict[str, Any](), dict[str, int]()
        for _ in range(keys):
            key, kind = self._text(), self._number("I")
            if kind == _ARRAY:
                lengths[key] = self._pass_array()
            else:
                metadata[key] = self._text() if kind == _STRING else self._number(_FORMATS[kind])
        return Header(metadata, lengths, tuple(self._tensor() for _ in range(tensors)))

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._content, self._at)
        self._at += struct.calcsize(f"<{kind}")
        return value

    def _text(self) -> str:
        length = self._number("Q")
        found = self._content[self._at : self._at + length]
        if len(found) < length:
            raise IndexError(length)
        self._at += length
        return found.decode()

    def _pass_array(self) -> int:
        """Skip an array's values; returns its length."""
        kind, length = self._number("I"), self._number("Q")
        if kind == _STRING:
            for _ in range(length):
                size = self._number("Q")
                self._at += size
        else:
            self._at += length * struct.calcsize(f"<{_FORMATS[kind]}")
        return int(length)

    def _tensor(self) -> str:
        name, dimensions = self._text(), self._number("I")
        self._at += 8 * dimensions + 4 + 8  # its shape, its type, where its values begin
        return name
