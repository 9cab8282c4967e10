"""Folds QA-LoRA into integer zeros, which every reader of GPTQ knows, and says how much of the adapter that loses.

z' = round(z - dW / s), within what the bits hold: an update of less than half a scale is gone (docs/decisions.md).
"""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from qdist.core.errors import RunError
from qdist.core.model.gptq import Gptq
from qdist.core.requests import Export
from qdist.host.files import require_space
from qdist.host.terminal import say
from qdist.runtime.exports.gptq_base import OFFSET, GptqBase, GroupUpdates, Packed
from qdist.runtime.exports.update import Adapters
from qdist.runtime.formats.packed_folder import Entry, finished, write_missing
from qdist.runtime.formats.work_folder import built
from qdist.runtime.kernels.gptq_bits import pack_zeros, unpack_zeros

_QZEROS, _SCALES = ".qzeros", ".scales"
_VERSION = 1
"""Raise it whenever the same runs would become other bytes."""


class Lost(NamedTuple):
    """The loss from rounding zeros."""

    relative: float
    """Norm of what is lost, relative to the norm of the update."""
    clipped: int
    """Number of zeros that exceeded the range of the bits."""
    zeros: int


def run(request: Export) -> None:
    """Write the checkpoint and report the loss. Raises RunError, with the loss, unless losses are allowed."""
    adapters, out = Adapters.named_in(request), Path(request.out)
    if not request.lossy:
        lost = loss_of_zeros(adapters)
        raise RunError(
            f"integer zeros would lose {lost.relative:.1%} of the adapter",
            try_="qdist merge, which loses nothing, or --lossy",
        )
    lost = fold_zeros(adapters, out)
    say(f"{out}: {lost.relative:.1%} of the adapter is lost; {lost.clipped:,} of {lost.zeros:,} zeros were clipped")


def loss_of_zeros(adapters: Adapters) -> Lost:
    """What `fold_zeros` would lose, without writing anything."""
    return _Folder(adapters).lost()


def fold_zeros(adapters: Adapters, out: Path) -> Lost:
    """Write a plain GPTQ checkpoint, in the format gptq_v2, to `out`, which must not exist.

    Raises RunError if the update is not constant within groups.
    """
    folder = _Folder(adapters)
    base = folder.base
    with built(out, f"zeros {_VERSION} {base.stamp} {adapters.stamp}") as work:
        files = {file: there for file in base.files if (there := finished(work, file))}
        missing = base.bytes - sum(there.bytes for there in files.values())
        require_space(out.parent, missing, purpose=f"folding into {base.plan.spec.model}")
        files = write_missing(work, base.files, folder.entries)
        base.finish(work, folder.gptq, files)
    return folder.lost()


class _Folder:
    """A checkpoint with changed zeros."""

    def __init__(self, adapters: Adapters) -> None:
        self.base = GptqBase(adapters.plan, adapters)
        self._updates = GroupUpdates(self.base, adapters)

    @property
    def gptq(self) -> Gptq:
        """Its GPTQ settings: zeros may be any number, including 0, which the format gptq cannot hold."""
        return msgspec.structs.replace(self.base.gptq, sym=False, format="gptq_v2", offset=None)

    def entries(self, file: str) -> list[Entry]:
        """The base's tensors with the zeros replaced."""
        before = {e.name: e for e in self.base.entries(file) if not e.name.endswith(OFFSET)}
        after = dict(before)
        for linear in self.base.linears(file):
            name = linear.path + _QZEROS
            after[name] = before[name]._replace(make=partial(self._qzeros, file, linear, before))
        return list(after.values())

    def lost(self) -> Lost:
        """The loss over all changed linears."""
        missing = total = 0.0
        clipped = count = 0
        for file in self.base.files:
            tensors = {entry.name: entry for entry in self.base.entries(file)}
            for linear in self._updates.linears(file):
                zeros, scales, update = self._parts(file, linear, tensors)
                wanted = _rounded(zeros, scales, update)
                new = wanted.clamp(0, self._highest(linear))
                each = linear.inputs / len(zeros)
                missing += each * float((((zeros - new) * scales) - update).double().square().sum())
                total += each * float(update.double().square().sum())
                clipped, count = clipped + int((new != wanted).sum()), count + new.numel()
        if not count:
            raise RunError("no linear is changed by the adapter", try_="another run")
        return Lost(math.sqrt(missing / total) if total else 0.0, clipped, count)

    def _qzeros(self, file: str, linear: Packed, tensors: dict[str, Entry]) -> torch.Tensor:
        wanted = _rounded(*self._parts(file, linear, tensors))
        return pack_zeros(wanted.clamp(0, self._highest(linear)).to(torch.int32), self._bits(linear), 0)

    def _parts(
        self, file: str, linear: Packed, tensors: dict[str, Entry]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(zeros, scales, update), float32 [groups, out]."""
        stored, scales = tensors[linear.path + _QZEROS].make(), tensors[linear.path + _SCALES].make().float()
        zeros = unpack_zeros(stored, self._bits(linear), self.base.gptq.zero_offset).float()
        if linear.path.rpartition(".")[2] not in self._updates.leaves:
            return zeros, scales, torch.zeros_like(zeros)
        update = self._updates.whole(file, linear)
        return zeros, scales, update.repeat_interleave(len(zeros) // len(update), dim=0)

    def _bits(self, linear: Packed) -> int:
        shape = self.base.gptq.of(linear.path)
        assert shape is not None
        return shape.bits

    def _highest(self, linear: Packed) -> int:
        return (1 << self._bits(linear)) - 1


def _rounded(zeros: torch.Tensor, scales: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """The integers nearest to the zeros that an update asks for; float32 [groups, out], like all arguments.

    A scale of 0 makes a group of zeros, whatever its zero is: nothing of the update is kept there.
    """
    return (zeros - torch.where(scales == 0, 0.0, update / scales)).round()
