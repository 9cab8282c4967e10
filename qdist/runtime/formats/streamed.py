"""A safetensors file of tensors that are too large to hold: written from parts, and checked a chunk at a time."""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from qdist.runtime.formats.checksum import add_checksums, slice_checksum
from qdist.runtime.formats.packed_folder import NAMES, Entry, header_of, in_order
from qdist.runtime.formats.recorded_sums import Held, is_intact_by_sums, sealed_by_sums

_CHUNK_BYTES = 1 << 24
_LENGTH_BYTES = 8
"""Bytes of a file that say how long its header is."""


class Stream(NamedTuple):
    """A one-dimensional tensor that comes in parts, each time it is asked for."""

    dtype: torch.dtype
    size: int
    parts: Callable[[], Iterable[torch.Tensor]]

    def entry(self, name: str) -> Entry:
        """It as a whole."""
        return Entry(name, self.dtype, (self.size,), lambda: torch.cat(list(self.parts())))


def stream_of(tensor: torch.Tensor) -> Stream:
    """A tensor that is in memory, as its only part."""
    return Stream(tensor.dtype, tensor.numel(), lambda: (tensor,))


def write_streams(file: BinaryIO, streams: Mapping[str, Stream], metadata: Mapping[str, str]) -> None:
    """Write a sealed file, of which a part at a time is in memory. Each stream is read twice: first for its sums."""
    held = {name: Held(own.dtype, (own.size,), _sums(map(_bytes, own.parts()))) for name, own in streams.items()}
    ordered = in_order(own.entry(name) for name, own in streams.items())
    file.write(header_of(ordered, {"format": "pt", **sealed_by_sums(held, metadata)}))
    for entry in ordered:
        for part in streams[entry.name].parts():
            file.write(memoryview(_bytes(part).numpy()))


def is_file_intact(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file matches its digest; True for one without. Its pages are not mapped.

    metadata: its own.
    """
    return is_intact_by_sums(_stored(path), metadata)


def _stored(path: Path) -> dict[str, Held]:
    """What is in a file of tensors."""
    kinds = {name: dtype for dtype, name in NAMES.items()}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        table = json.loads(file.read(length))
        return {
            name: Held(kinds[own["dtype"]], tuple(own["shape"]), _sums(_chunks(file, length, *own["data_offsets"])))
            for name, own in table.items()
            if name != "__metadata__"
        }


def _chunks(file: io.BufferedReader, header_bytes: int, start: int, stop: int) -> Iterator[torch.Tensor]:
    """The bytes of a tensor, in chunks that are overwritten by the next one."""
    file.seek(_LENGTH_BYTES + header_bytes + start)
    buffer = bytearray(min(_CHUNK_BYTES, stop - start))
    for at in range(start, stop, _CHUNK_BYTES):
        view = memoryview(buffer)[: stop - at]
        yield torch.frombuffer(view, dtype=torch.uint8)[: file.readinto(view)]


def _sums(parts: Iterable[torch.Tensor]) -> tuple[int, int]:
    """The checksum of bytes that come in parts."""
    found, first_byte = (0, 0), 0
    for part in parts:
        found = add_checksums(found, slice_checksum(part, first_byte))
        first_byte += part.numel()
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
