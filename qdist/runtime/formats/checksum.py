"""Checksums of bytes sliced over several ranks, and whether the bytes read of a tensor are those written."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist

from qdist.core.errors import ModelError
from qdist.core.text import quoted
from qdist.host.files import cache_path
from qdist.runtime.kernels import sums

MODULUS = 1 << 64
_ROW_WORDS = 1 << 11
FEW_BYTES = 1 << 20
_FEW_WORDS = 1 << 14
"""Words below which fewer calls matter more than fewer bytes."""
_CHUNK_WORDS = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Words per chunk: on a CPU, what fits a core's cache with its 64-bit copy; on a GPU, what keeps it busy."""


def slice_checksum(flat_bytes: torch.Tensor, first_byte: int) -> tuple[int, int]:
    """Two sums modulo 2**64 over a slice of a byte string; see `slice_sums`.

    flat_bytes: uint8, one-dimensional, on any device.
    first_byte: where the slice begins in the whole.
    """
    plain, weighted = slice_sums(flat_bytes, first_byte).tolist()
    return plain % MODULUS, weighted % MODULUS


def slice_sums(flat_bytes: torch.Tensor, first_byte: int) -> torch.Tensor:
    """The two sums of `slice_checksum` as int64 [2], on the bytes' device, for an all-reduce over ranks.

    With the whole read as little-endian signed 32-bit words w_0, w_1, ...: the sum of w_k, and that of (k + 1) * w_k,
    both modulo 2**64. Each byte adds its own share, so sums of slices add up wherever the whole was cut. The weights
    make a swap of two words show. Nothing as large as the slice is made, unless it begins within a word: then chunks
    are copied, one at a time.
    """
    if flat_bytes.dtype != torch.uint8 or flat_bytes.dim() != 1:
        raise ValueError(f"a checksum is over uint8 [n], not {flat_bytes.dtype} {list(flat_bytes.shape)}")
    chunk_words = _CHUNK_WORDS[flat_bytes.device.type]
    start, total = 0, torch.zeros(2, dtype=torch.int64, device=flat_bytes.device)
    if _begins_at_a_word(flat_bytes, first_byte):
        start = flat_bytes.numel() // 4 * 4
        total += _word_sums(flat_bytes[:start].view(torch.int32), first_byte // 4, chunk_words)
    while start < flat_bytes.numel():
        # Each chunk ends at a word of the whole.
        lead = (first_byte + start) % 4
        stop = min(flat_bytes.numel(), start + 4 * chunk_words - lead)
        words = _words(flat_bytes[start:stop], lead)
        total += _word_sums(words, (first_byte + start) // 4, chunk_words)
        start = stop
    return total


def tensor_checksum(tensor: torch.Tensor) -> tuple[int, int]:
    """The checksum of a whole tensor's bytes, as laid out in a file."""
    if has_few_bytes(tensor):
        return _few_bytes_checksum(tensor)
    return slice_checksum(tensor.detach().contiguous().reshape(-1).view(torch.uint8), 0)


def has_few_bytes(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the CPU and small enough that its checksum is immediate."""
    return tensor.device.type == "cpu" and tensor.nbytes <= FEW_BYTES


def _few_bytes_checksum(tensor: torch.Tensor) -> tuple[int, int]:
    """The checksum of up to FEW_BYTES on the CPU, in a tenth of torch's time.

    One thread does it: at this size torch's calls and thread synchronization cost more than the bytes.
    """
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    if content.size % 4:
        content = np.pad(content, (0, -content.size % 4))
    words = content.view("<i4").astype(np.int64)
    return int(words.sum()) % MODULUS, int(words @ _numbered()[: len(words)]) % MODULUS


@cache
def _numbered() -> "np.ndarray[Any, np.dtype[np.int64]]":
    return np.arange(1, FEW_BYTES // 4 + 1)


def file_checksum(file: Path) -> tuple[int, int]:
    """The checksum of a file's bytes."""
    size = file.stat().st_size
    return slice_checksum(torch.from_file(str(file), size=size, dtype=torch.uint8), 0) if size else (0, 0)


def add_checksums(*checksums: tuple[int, int]) -> tuple[int, int]:
    """The checksum of a whole, from those of its slices."""
    return sum(plain for plain, _ in checksums) % MODULUS, sum(weighted for _, weighted in checksums) % MODULUS


def _begins_at_a_word(flat_bytes: torch.Tensor, first_byte: int) -> bool:
    aligned = flat_bytes.data_ptr() % 4 == 0 and flat_bytes.storage_offset() % 4 == 0
    return aligned and first_byte % 4 == 0


def _words(chunk: torch.Tensor, lead: int) -> torch.Tensor:
    """Bytes as int32 words, with zeros for bytes of the first and last word that belong to other slices."""
    count = lead + chunk.numel()
    padded = torch.zeros(-(-count // 4) * 4, dtype=torch.uint8, device=chunk.device)
    padded[lead:count] = chunk
    return padded.view(torch.int32)


def _word_sums(words: torch.Tensor, first_word: int, chunk_words: int) -> torch.Tensor:
    """Both sums, by rows and columns: sum((r * width + c) * w) needs no vector of word positions.

    Words are widened a chunk at a time into one buffer: a sum that widens as it goes is ten times slower on a CPU, and
    on a GPU makes a copy for each of the two sums.
    """
    if words.is_cuda and words.numel() and sums.usable(words.device):
        found = sums.word_sums(words)
        return found + first_word * torch.stack((torch.zeros_like(found[0]), found[0])) if first_word else found
    if words.numel() <= _FEW_WORDS:
        values = words.long()
        return torch.stack((values.sum(), (values * (_positions(values) + (first_word + 1))).sum()))
    rows = words.numel() // _ROW_WORDS
    table, rest = words[: rows * _ROW_WORDS].view(rows, _ROW_WORDS), words[rows * _ROW_WORDS :].long()
    at_a_time = max(1, min(rows, chunk_words // _ROW_WORDS))
    sums_of = _sums_on_one_core if words.device.type == "cpu" else _sums_of_chunks
    by_row, by_column = sums_of(table, at_a_time)
    plain = by_row.sum() + rest.sum()
    within = (by_row * _positions(by_row)).sum() * _ROW_WORDS + (by_column * _positions(by_column)).sum()
    within += (rest * (_positions(rest) + rows * _ROW_WORDS)).sum()
    return torch.stack((plain, within + (first_word + 1) * plain))


def _sums_of_chunks(table: torch.Tensor, at_a_time: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of int32 rows and columns, int64."""
    wide = torch.empty((at_a_time, _ROW_WORDS), dtype=torch.int64, device=table.device)
    by_row = torch.empty(len(table), dtype=torch.int64, device=table.device)
    by_column = torch.zeros(_ROW_WORDS, dtype=torch.int64, device=table.device)
    for first in range(0, len(table), at_a_time):
        part = wide[: min(at_a_time, len(table) - first)].copy_(table[first : first + at_a_time])
        torch.sum(part, 1, out=by_row[first : first + at_a_time])
        by_column += part.sum(0)
    return by_row, by_column


def _sums_on_one_core(table: torch.Tensor, at_a_time: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by numpy. One core sums 3.8 GB/s. Where torch's threads share the cores with another run's, they wait
    for each other at each of the small chunks: 0.55 GB/s, and minutes for a checkpoint where four runs are started.
    """
    given = table.numpy()
    wide = np.empty((at_a_time, _ROW_WORDS), np.int64)
    by_row, by_column = np.empty(len(given), np.int64), np.zeros(_ROW_WORDS, np.int64)
    for first in range(0, len(given), at_a_time):
        part = wide[: min(at_a_time, len(given) - first)]
        np.copyto(part, given[first : first + at_a_time])
        part.sum(1, out=by_row[first : first + at_a_time])
        by_column += part.sum(0)
    return torch.from_numpy(by_row), torch.from_numpy(by_column)


def _positions(values: torch.Tensor) -> torch.Tensor:
    return torch.arange(values.numel(), device=values.device)


Sums = Mapping[str, tuple[int, int]]
"""`qdist.runtime.formats.checksum` of each tensor in a folder, by its name."""


def digest_of(sums: Sums) -> str:
    """SHA-256 over names and sums: identifies the tensors, whatever their files and however often written."""
    return hashlib.sha256(json.dumps(sorted((name, *pair) for name, pair in sums.items())).encode()).hexdigest()


def require_sums(file: Path, name: str, tensor: torch.Tensor, expected: Sums | None) -> torch.Tensor:
    """The tensor, read whole from a file. Raises ModelError if its sums differ from the expected ones."""
    check = SumCheck(expected)
    check.add(file, name, tensor)
    check.finish()
    return tensor


class _Read(NamedTuple):
    file: Path
    name: str
    sums: torch.Tensor
    """int64 [2], on the device of the bytes."""
    group: Any
    """The ranks that hold the rest of a sharded tensor; None if all of it is on this rank."""


class SumCheck:
    """Sums computed on each tensor's device as it is read, compared at the end: one GPU synchronization in all."""

    def __init__(self, expected: Sums | None, *, share: tuple[int, int] = (0, 1)) -> None:
        """expected: None if the folder has no recorded sums; then nothing is summed here either.

        share: (which, of how many): processes that map the same files into the same memory divide whole tensors.
        """
        self.expected, self._share = expected, share
        self._read: list[_Read] = []

    def add(
        self,
        file: Path,
        name: str,
        tensor: torch.Tensor,
        *,
        first_byte: int = 0,
        group: Any = None,
        is_whole: bool = True,
    ) -> None:
        """Sum a tensor, or for a sharded one this rank's rows, which begin at `first_byte` of the whole."""
        if self.expected is None or (is_whole and crc32(name.encode()) % self._share[1] != self._share[0]):
            return
        if name not in self.expected:
            raise ModelError(f"{file}: nothing was recorded of the tensor {name}", try_=again(file.parent))
        if is_whole and has_few_bytes(tensor):
            self._require(file, name, tensor_checksum(tensor))
            return
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self._read.append(_Read(file, name, slice_sums(content, first_byte), group))

    def finish(self) -> None:
        """Compare everything read so far. Collective if tensors are sharded.

        Raises ModelError naming the first tensor whose bytes are others; `add` does so at once of small ones.
        """
        read, self._read = self._read, []
        for device in {each.sums.device for each in read}:
            here = [each for each in read if each.sums.device == device]
            for group in {each.group for each in here}:
                self._compare([each for each in here if each.group is group], group)

    def _compare(self, read: list[_Read], group: Any) -> None:
        found = torch.stack([each.sums for each in read])
        if group is not None:
            dist.all_reduce(found, group=group)
        for each, (plain, weighted) in zip(read, found.tolist(), strict=True):
            self._require(each.file, each.name, (plain % MODULUS, weighted % MODULUS))

    def _require(self, file: Path, name: str, sums: tuple[int, int]) -> None:
        assert self.expected is not None  # or nothing would have been summed
        if sums != tuple(self.expected[name]):
            raise ModelError(f"{file}: the bytes of {name} are not those that were written", try_=again(file.parent))


def again(folder: Path) -> str:
    """How to restore a damaged folder."""
    if folder.resolve().is_relative_to(cache_path().resolve()):
        return f"{quoted('rm', '-r', folder)}: what is in the cache is made again from the model"
    return f"put a whole copy of {folder} in its place: download it, or quantize or export it again"
