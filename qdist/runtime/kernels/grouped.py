"""Products of rows that are sorted by group with a matrix of each group, as the experts of a layer need them."""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn import functional

_ALIGNED_BYTES = 16
"""torch's grouped product on CUDA reads rows of a multiple of this."""


class Pairs:
    """Pairs of a token and an expert, sorted by expert; the pairs of an expert in the order of its tokens.

    index: the experts of each token, [tokens, experts a token]. count: of experts.
    """

    def __init__(self, index: torch.Tensor, count: int) -> None:
        self.per_token, self.count = index.shape[-1], count
        self.experts, self.order = torch.sort(index.reshape(-1), stable=True)
        """The expert of each pair, and its position among the unsorted pairs."""

    @cached_property
    def ends(self) -> torch.Tensor:
        """Where the pairs of each expert end, int32 [experts]."""
        experts = torch.arange(self.count, device=self.experts.device)
        return torch.searchsorted(self.experts, experts, right=True).to(torch.int32)

    @cached_property
    def occupied(self) -> tuple["Span", ...]:
        """The experts that got pairs. Waits for the GPU."""
        starts = [0, *(ends := self.ends.tolist())]
        spans = (Span(group, *span) for group, span in enumerate(zip(starts, ends, strict=False)))
        return tuple(span for span in spans if span.end > span.start)

    def gathered(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of tokens as rows of pairs."""
        return tokens[self.order // self.per_token]

    def summed(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of pairs added up over the experts of each token: always in the same order, unlike index_add on CUDA."""
        return rows[self.places].view(-1, self.per_token, rows.shape[-1]).sum(1)

    @cached_property
    def places(self) -> torch.Tensor:
        """The position of each unsorted pair among the sorted ones."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=places.device)
        return places


class Span(NamedTuple):
    """The rows of one group."""

    group: int
    start: int
    end: int


def has_kernel(like: torch.Tensor, *sizes: int) -> bool:
    """Whether one kernel multiplies all groups: torch's, for bfloat16 on GPUs since Ampere.

    like: of the device and dtype of the product. sizes: of the matrices' last two dimensions. Elsewhere a loop over
    the groups is as fast (CPU), or all that there is.
    """
    if not like.is_cuda or like.dtype != torch.bfloat16 or not hasattr(functional, "grouped_mm"):
        return False
    aligned = all(size * like.element_size() % _ALIGNED_BYTES == 0 for size in sizes)
    return aligned and torch.cuda.get_device_capability(like.device) >= (8, 0)


def products(rows: torch.Tensor, matrices: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """rows [pairs, in] times the matrix of each one's group, [groups, in, out]: [pairs, out]."""
    if has_kernel(rows, *matrices.shape[1:]):
        return _grouped(rows, matrices, pairs)
    return looped(rows, ((span, matrices[span.group]) for span in pairs.occupied), matrices.shape[-1])


def looped(rows: torch.Tensor, matrices: Iterator[tuple[Span, torch.Tensor]], outputs: int) -> torch.Tensor:
    """The same from one matrix [in, out] at a time: of every group that has rows."""
    result = rows.new_empty((len(rows), outputs))
    for span, matrix in matrices:
        torch.mm(rows[span.start : span.end], matrix, out=result[span.start : span.end])
    return result


def outer_products(left: torch.Tensor, right: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """left' right over the rows of each group, where ' is the transpose: float32 [groups, left's, right's columns].

    Zero for groups without rows.
    """
    if has_kernel(left, left.shape[1], right.shape[1]):
        result = _grouped(left.t(), right, pairs).float()
        # What the kernel leaves of a group without rows is not defined.
        sizes = pairs.ends.diff(prepend=pairs.ends.new_zeros(1))
        return result.masked_fill_((sizes == 0).view(-1, 1, 1), 0.0)
    result = left.new_zeros((pairs.count, left.shape[1], right.shape[1]))
    for group, start, end in pairs.occupied:
        torch.mm(left[start:end].t(), right[start:end], out=result[group])
    return result if result.dtype == torch.float64 else result.float()


def _grouped(left: torch.Tensor, right: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    product: torch.Tensor = functional.grouped_mm(left, right, offs=pairs.ends)
    return product
