"""Are the bytes that are read of a folder's tensors those that were written? Sums tell, those of slices together."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist

from qdist.core.errors import ModelError
from qdist.core.quoting import quoted
from qdist.host.files import cache_path
from qdist.runtime.checksum import MODULUS, has_few_bytes, slice_sums, tensor_checksum

Sums = Mapping[str, tuple[int, int]]
"""`qdist.runtime.checksum` of each tensor of a folder, by its name."""


def digest_of(sums: Sums) -> str:
    """SHA-256 over names and sums: which tensors they are, in whatever files and whenever written."""
    return hashlib.sha256(json.dumps(sorted((name, *pair) for name, pair in sums.items())).encode()).hexdigest()


def require_sums(file: Path, name: str, tensor: torch.Tensor, expected: Sums | None) -> torch.Tensor:
    """The tensor, read whole from a file. Raises ModelError where its sums are others than those expected of it."""
    check = SumCheck(expected)
    check.add(file, name, tensor)
    check.finish()
    return tensor


class _Read(NamedTuple):
    file: Path
    name: str
    sums: torch.Tensor
    """int64 [2], where the bytes are."""
    group: Any
    """The ranks that hold the rest of a sharded tensor; None where all of it is here."""


class SumCheck:
    """Sums of what is read, taken where it lies and compared at the end: a GPU is waited for once."""

    def __init__(self, expected: Sums | None, *, share: tuple[int, int] = (0, 1)) -> None:
        """expected: None where nobody has summed the folder: nothing is summed here either.

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
        """Sum a tensor, or of a sharded one the rows that are here, which begin at `first_byte` of the whole."""
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
        """Compare all that was read since. Collective where tensors are sharded.

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
    """What brings a damaged folder back."""
    if folder.resolve().is_relative_to(cache_path().resolve()):
        return f"{quoted('rm', '-r', folder)}: what is in the cache is made again from the model"
    return f"put a whole copy of {folder} in its place: download it, or quantize or export it again"
