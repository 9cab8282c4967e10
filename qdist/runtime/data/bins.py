"""How do the samples of a step become micro-batches? Cut in order, or packed into bins of a fixed size."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

_FEWEST_SEGMENTS = 8
_SEGMENTS_OVER_MEAN = 2
"""A bin may hold this many times the samples of mean length that fill it. It is a bound on the length of `ends`, which
is one for a run: a data set with a few samples of five tokens would otherwise have thousands of empty segments."""


class BinSize(NamedTuple):
    """How much a packed micro-batch holds."""

    positions: int
    samples: int
    """Samples at most."""


def bin_size(*, micro_batch: int, seq_len: int, mean_length: float) -> BinSize:
    """The size of a run's bins: one row of `micro_batch * seq_len` positions.

    mean_length: tokens of a sample of the data set, in the mean.
    """
    positions = micro_batch * seq_len
    fitting = -(-positions // max(1, round(mean_length)))
    return BinSize(positions, max(_FEWEST_SEGMENTS, _SEGMENTS_OVER_MEAN * fitting))


def cut(samples: Sequence[int], size: int) -> list[list[int]]:
    """Micro-batches of `size` samples in order; the last one may have fewer."""
    return [list(samples[start : start + size]) for start in range(0, len(samples), size)]


def pack(lengths: Sequence[int], size: BinSize) -> list[list[int]]:
    """Bins that hold every sample once, each sample in the bin that it fills best, the longest first.

    lengths: tokens of each sample, none above `size.positions`. Returns positions in `lengths`. Best-fit decreasing
    needs at most 11/9 of the fewest bins (Johnson 1973).
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free positions, bin), ascending
    for sample in _longest_first(lengths):
        at = bisect_left(rooms, (lengths[sample], -1))
        if at < len(rooms):
            room, own = rooms.pop(at)
        else:
            room, own = size.positions, len(bins)
            bins.append([])
        bins[own].append(sample)
        if len(bins[own]) < size.samples:
            insort(rooms, (room - lengths[sample], own))
    return bins


def deal(lengths: Sequence[int], size: BinSize, *, ranks: int, least: int = 1) -> list[list[int]]:
    """Bins for all ranks, of which rank r takes those at r, r + ranks, ...: as many for each, with like work.

    least: bins of each rank at least, such as the stages of a pipeline. Some may be empty. Returns positions in
    `lengths`, as `pack` does. Ranks compute their first bins at the same time, then their second: bins of like work are
    beside each other, and no rank always has the larger one.
    """
    bins = pack(lengths, size)
    count = ranks * max(least, -(-len(bins) // ranks))
    even = _spread(lengths, size, count)
    bins = even if even is not None else [*bins, *([] for _ in range(count - len(bins)))]
    ordered = sorted(bins, key=lambda own: -attention_work(lengths, own))
    rounds = [ordered[start : start + ranks] for start in range(0, count, ranks)]
    return [own for number, each in enumerate(rounds) for own in (each[::-1] if number % 2 else each)]


def attention_work(lengths: Sequence[int], samples: Sequence[int]) -> int:
    """Work of attention in a bin, whose samples see only themselves: the sum of squared lengths."""
    return sum(lengths[sample] ** 2 for sample in samples)


def _spread(lengths: Sequence[int], size: BinSize, count: int) -> list[list[int]] | None:
    """The samples in `count` bins, each put where the least work is; None where one does not fit that way."""
    bins: list[list[int]] = [[] for _ in range(count)]
    rooms = [size.positions] * count
    least = [(0, own) for own in range(count)]
    for sample in _longest_first(lengths):
        full = []
        while least and (rooms[least[0][1]] < lengths[sample] or len(bins[least[0][1]]) == size.samples):
            full.append(heapq.heappop(least))
        if not least:
            return None
        work, own = heapq.heappop(least)
        bins[own].append(sample)
        rooms[own] -= lengths[sample]
        for each in (*full, (work + lengths[sample] ** 2, own)):
            heapq.heappush(least, each)
    return bins


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda sample: -lengths[sample])
