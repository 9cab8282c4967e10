"""How full are micro-batches, and where is it worth packing several samples in a row? From the lengths of samples."""

from math import ceil
from typing import NamedTuple

from msgspec import structs

from qdist.core.planning.plan import DataFacts, Fill, mean_length

WORTH = 0.9
"""Share of the positions of whole sequences that packed micro-batches may have for the planner to pack by itself."""


_FILLED = 0.9
"""Share of a packed row that samples fill, where it was not counted: they are not cut, and steps differ in tokens."""
_MOST_ROWS = 16
"""Rows of a rank and step up to which sizes are tried that make just so many."""
_WORTH_SAYING = 0.005
"""Share of padding below which useful tokens and all tokens are the same to a reader."""


def has_padding(useful_share: float) -> bool:
    """Whether useful tokens/s should be told from all tokens/s."""
    return useful_share < 1 - _WORTH_SAYING


MOST_COUNTED = 16
"""Largest size of packed micro-batches whose fill is counted while data are tokenized."""


class MicroBatch(NamedTuple):
    """The size of a micro-batch, and how samples lie in it."""

    samples: int
    """Samples, or if packed, longest sequences that its row has room for."""
    packed: bool = False


class Batches(NamedTuple):
    """The samples of an optimizer step, and the data-parallel ranks that share them."""

    data: DataFacts | None
    """The tokenized data; None for samples that are all of the longest sequence."""
    global_batch: int
    ranks: int
    longest: int
    """Tokens of the longest sequence."""
    least: int = 1
    """Packed rows of a rank and step at least: the stages of a pipeline."""

    @property
    def mean_length(self) -> float:
        """Mean tokens of a sample."""
        return mean_length(self.data, longest=self.longest)

    @property
    def tokens(self) -> float:
        """Mean tokens of an optimizer step."""
        return self.global_batch * self.mean_length

    def fill_of(self, micro_batch: MicroBatch) -> Fill | None:
        """How full micro-batches are: as counted, or as estimated; None if all samples count as the longest."""
        size, packed = micro_batch
        key = size, self.ranks if packed else 1, packed
        counted = next((own for own in self._counted if (own.samples, own.ranks, own.packed) == key), None)
        if counted is None:
            return self.estimate(micro_batch)
        if packed:
            return counted if counted.micro_batches >= self.least else self._bins(size, self.least)
        return structs.replace(counted, ranks=self.ranks, micro_batches=counted.micro_batches / self.ranks)

    @property
    def _counted(self) -> tuple[Fill, ...]:
        return self.data.fills if self.data else ()

    def estimate(self, micro_batch: MicroBatch) -> Fill | None:
        """The same from the mean length: rows of one sample as wide as the longest, packed ones as full as usual."""
        size, packed = micro_batch
        if packed:
            rows = ceil(self.tokens / (self._filled * size * self.longest))
            return self._bins(size, max(self.least, ceil(rows / self.ranks)))
        if self.data is None or not self.data.path:
            return None
        number, share = self.global_batch / (size * self.ranks), self.mean_length / self.longest
        return Fill(samples=size, ranks=self.ranks, micro_batches=number, share=share, packed=False)

    def _bins(self, size: int, number: int) -> Fill:
        """The tokens of a step in so many packed rows of each rank."""
        share = self.tokens / (number * self.ranks * size * self.longest)
        return Fill(samples=size, ranks=self.ranks, micro_batches=float(number), share=share)

    @property
    def _filled(self) -> float:
        return _FILLED if self.mean_length < self.longest else 1.0

    def packed_sizes(self, most: int) -> list[int]:
        """Sizes of packed micro-batches worth trying, up to `most`: any works, and few are well filled."""
        total = self.tokens / (self._filled * self.longest * self.ranks)
        exact = (ceil(total / rows) for rows in range(1, _MOST_ROWS + 1))
        return sorted({1, *(size for size in (*range(1, MOST_COUNTED + 1), *exact) if size <= most)})

    def packed_positions(self, size: int) -> float:
        """Positions of an optimizer step in packed micro-batches of a size."""
        fill = self.fill_of(MicroBatch(size, packed=True))
        assert fill is not None
        return fill.micro_batches * self.ranks * size * self.longest

    def is_worth_packing(self, size: int) -> bool:
        """Whether packed micro-batches of a size have well fewer positions than whole sequences would."""
        return self.packed_positions(size) <= WORTH * self.global_batch * self.longest
