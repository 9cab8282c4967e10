"""Sums of the products of a linear's inputs with each other, the same to the bit on any number of devices."""

from typing import NamedTuple

import torch

_COLUMNS = 1 << 11
"""Of a Hessian, that are summed at a time, down to the diagonal: it is symmetric."""


class _Sum(NamedTuple):
    begin: int
    lanes: int
    total: torch.Tensor


class LaneSums:
    """Sums of lanes that follow each other, added by twos: lanes 0 and 1, 2 and 3, then those of 0 to 3.

    So a device adds up what it has before it hands it on, in the order in which one device would add all of it, and
    few sums are kept: the binary digits of their number.
    """

    def __init__(self) -> None:
        self._sums = list[_Sum]()

    def append(self, lane: int, total: torch.Tensor) -> None:
        """Take the sum of the next lane, which is not to be used elsewhere."""
        self._push(_Sum(lane, 1, total))

    def extend(self, others: "LaneSums") -> None:
        """Take the sums of another device, of the lanes that come next."""
        for other in others._sums:
            self._push(other)

    def total(self) -> torch.Tensor:
        """Of all lanes, where the first of them is."""
        while len(self._sums) > 1:
            self._add()
        return self._sums[0].total

    def _push(self, later: _Sum) -> None:
        self._sums.append(later)
        while len(self._sums) > 1:
            earlier, later = self._sums[-2:]
            if earlier.lanes != later.lanes or earlier.begin % (2 * later.lanes):
                break
            self._add()

    def _add(self) -> None:
        earlier, later = self._sums[-2], self._sums.pop()
        earlier.total.add_(later.total.to(earlier.total.device))
        self._sums[-1] = earlier._replace(lanes=earlier.lanes + later.lanes)


def add_products(total: torch.Tensor, rows: torch.Tensor, factor: float) -> None:
    """total += factor X^T X, in float32; what lies far below the diagonal is left to `mirror`.

    Products of 16-bit numbers are exact there, also on a GPU's matrix units.
    """
    short = rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)
    rows = rows if short else rows.to(torch.float32)
    for start in range(0, len(total), _COLUMNS):
        end = start + _COLUMNS
        above, part = total[:end, start:end], rows[:, start:end]
        if short:
            above.add_(torch.mm(rows[:, :end].t(), part, out_dtype=torch.float32), alpha=factor)
        else:
            above.addmm_(rows[:, :end].t(), part, alpha=factor)


def mirror(total: torch.Tensor) -> None:
    """Fill in what `add_products` left out."""
    for start in range(_COLUMNS, len(total), _COLUMNS):
        end = start + _COLUMNS
        total[start:end, :start] = total[:start, start:end].t()
