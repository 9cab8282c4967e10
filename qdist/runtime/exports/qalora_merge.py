"""Merges QA-LoRA into its checkpoint: every tensor unchanged, plus the offsets of each linear's groups.

W = s (q - z), and an update that is constant within a group is an offset of the group: W + dW = s (q - z) + dW. As a
zero, z - dW / s would have to be rounded to an integer (Xu et al. 2023, section 3.3; docs/decisions.md, "Merging").
"""

import math
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import torch

from qdist.core.errors import ModelError
from qdist.core.model.gptq import Gptq, WeightOffset
from qdist.host.files import require_space
from qdist.runtime.exports.gptq_base import OFFSET, GptqBase, GroupUpdates, Packed, packed_hash
from qdist.runtime.exports.update import Adapters
from qdist.runtime.formats.packed_folder import Entry, finished, opened, stored_entries, write_missing
from qdist.runtime.formats.work_folder import built

BOUND = 1e-3
"""Largest share of an update that rounding may lose (ratio of Frobenius norms)."""
LARGEST = 2.0**14
"""Approximate magnitude of the largest stored offset; float16 goes up to 65504."""
_VERSION = 1


class Difference(NamedTuple):
    """Difference between the adapter's weights and the merged model's, over all linears."""

    largest: float
    """Largest absolute difference, in weight units."""
    relative: float
    """Norm of the difference, relative to the norm of the update."""
    unchanged: int
    """Number of the base's tensors, compared bit for bit."""


def merge_offsets(adapters: Adapters, out: Path) -> Difference:
    """Write the checkpoint with offsets to `out`, which must not exist.

    Raises RunError if the update is not constant within groups, ModelError where it is NaN or rounding takes
    more of it than `BOUND`; nothing is there then.
    """
    plan = adapters.plan
    base = GptqBase(plan, adapters)
    merger = _Merger(base, GroupUpdates(base, adapters))
    with built(out, f"offsets {_VERSION} {base.stamp} {adapters.stamp}") as work:
        files = {file: there for file in base.files if (there := finished(work, file))}
        missing = base.bytes + merger.offset_bytes - sum(there.bytes for there in files.values())
        require_space(out.parent, missing, purpose=f"merging into {plan.spec.model}")
        files = write_missing(work, base.files, merger.entries)
        difference = merger.compared(work)
        base.finish(work, merger.gptq(packed_hash(files)), files)
    return difference


class _Merger:
    """The contents of a merged checkpoint's files."""

    def __init__(self, base: GptqBase, updates: GroupUpdates) -> None:
        self._base, self._updates = base, updates

    def gptq(self, base_hash: str) -> Gptq:
        """The merged checkpoint's GPTQ settings. If its base was already merged, the original base is kept."""
        old = self._base.gptq.offset
        offset = WeightOffset(
            group_size=self._updates.size,
            scale=self._scale,
            dtype=self._dtype,
            linears=self._updates.leaves,
            base=old.base if old else base_hash,
        )
        return msgspec.structs.replace(self._base.gptq, offset=offset)

    @property
    def offset_bytes(self) -> int:
        """Bytes of all stored offsets."""
        return sum(
            (2 if self._dtype == "float16" else 4) * self._updates.groups(linear) * linear.outputs
            for file in self._base.files
            for linear in self._updates.linears(file)
        )

    def entries(self, file: str) -> list[Entry]:
        """The base's tensors, and the offsets of the linears whose words are in this file."""
        kept = [entry for entry in self._base.entries(file) if not entry.name.endswith(OFFSET)]
        return kept + [
            Entry(
                own.path + OFFSET,
                getattr(torch, self._dtype),
                (self._updates.groups(own), own.outputs),
                partial(self._stored, file, own),
            )
            for own in self._updates.linears(file)
        ]

    def compared(self, work: Path) -> Difference:
        """Read back what was written and compare it with base and adapters."""
        largest = lost = total = 0.0
        unchanged = 0
        for file in self._base.files:
            for own in self._updates.linears(file):
                with opened(work / file) as handle:
                    stored = handle.get_tensor(own.path + OFFSET).float() * self._scale
                off = stored - self._updates.whole(file, own)
                largest = max(largest, float(off.abs().max()))
                lost, total = lost + _squares(off), total + _squares(self._updates.update(own))
            unchanged += self._unchanged(work, file)
        relative = math.sqrt(lost / total) if total else 0.0
        if not relative <= BOUND:
            raise ModelError(
                f"rounding offsets to {self._dtype} takes {relative:.2%} of the adapter, and {BOUND:.2%} is the most",
                try_="qdist export --to lora, which keeps the adapter",
            )
        return Difference(largest, relative, unchanged)

    def _unchanged(self, work: Path, file: str) -> int:
        """Number of the base's tensors found bit for bit in a written file: all, or RunError."""
        written = {entry.name: entry for entry in stored_entries(work, file)}
        kept = [entry for entry in self._base.untouched(file) if not entry.name.endswith(OFFSET)]
        for entry in kept:
            if not torch.equal(_bits(entry), _bits(written[entry.name])):
                raise ModelError(f"{entry.name} was not written as the base has it", try_="the same command again")
        return len(kept)

    @cached_property
    def _dtype(self) -> Literal["float16", "float32"]:
        """float16, unless that rounds away too much of an update that is small next to what was merged before."""
        lost = total = 0.0
        for file in self._base.files:
            for own in self._updates.linears(file):
                whole = self._updates.whole(file, own)
                lost += _squares((whole / self._power).half().float() * self._power - whole)
                total += _squares(self._updates.update(own))
        return "float16" if lost <= (BOUND / 2) ** 2 * total else "float32"

    @cached_property
    def _power(self) -> float:
        """The power of two that brings the largest offset to about `LARGEST`."""
        peaks = [
            float(self._updates.whole(file, own).abs().max())
            for file in self._base.files
            for own in self._updates.linears(file)
        ]
        largest = max(peaks, default=0.0)
        return 2.0 ** math.ceil(math.log2(largest / LARGEST)) if largest else 1.0

    @property
    def _scale(self) -> float:
        """Factor on the stored offsets."""
        return self._power if self._dtype == "float16" else 1.0

    def _stored(self, file: str, linear: Packed) -> torch.Tensor:
        """Stored offsets, [groups, out]."""
        return (self._updates.whole(file, linear) / self._scale).to(getattr(torch, self._dtype))


def _squares(values: torch.Tensor) -> float:
    """The sum of squares, in float64."""
    return float(values.double().square().sum())


def _bits(entry: Entry) -> torch.Tensor:
    return entry.make().contiguous().reshape(-1).view(torch.uint8)
