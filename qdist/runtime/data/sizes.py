"""Which few sizes do the tensors of a run have, so that each shape is captured once and little is padding?"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

MULTIPLE = 8
"""Sizes are multiples of this: Tensor Cores want matrix sides in multiples of 8 16-bit numbers."""
MOST_SIZES = 4
_MOST_CHOICES = 64


def padded(count: int) -> int:
    """`count` rounded up to the next multiple."""
    return -(-count // MULTIPLE) * MULTIPLE


def few_sizes(counts: Iterable[int], *, most: int = MOST_SIZES) -> tuple[int, ...]:
    """At most `most` sizes, ascending, such that counts that are padded to the next one have the least padding.

    The largest holds the largest count. Exact up to 64 multiples of 8, coarser where counts differ by more.
    """
    found = Counter(max(1, count) for count in counts)
    largest = padded(max(found))
    step = MULTIPLE * max(1, -(-largest // (MULTIPLE * _MOST_CHOICES)))
    weights = Counter[int]()
    for count, times in found.items():
        weights[min(-(-count // step) * step, largest)] += times
    choices = sorted(weights)
    return tuple(choices[index] for index in _best_levels(choices, [weights[each] for each in choices], most))


def _best_levels(choices: Sequence[int], weights: Sequence[int], most: int) -> list[int]:
    """Which of the ascending `choices` to keep: dynamic programming over where each level ends."""
    before = [0]
    for weight in weights:
        before.append(before[-1] + weight)
    # costs[end]: of padding choices[:end + 1] with choices[end] the last level.
    costs = [choice * before[end + 1] for end, choice in enumerate(choices)]
    levels = [[end] for end in range(len(choices))]
    for _ in range(most - 1):
        ways = [
            min(
                [(costs[end], -1)]
                + [(costs[last] + choices[end] * (before[end + 1] - before[last + 1]), last) for last in range(end)]
            )
            for end in range(len(choices))
        ]
        costs = [cost for cost, _ in ways]
        levels = [levels[end] if last < 0 else [*levels[last], end] for end, (_, last) in enumerate(ways)]
    return levels[-1]


def size_for(count: int, sizes: Sequence[int], *, otherwise: int) -> int:
    """The smallest of the ascending `sizes` that holds `count`; `otherwise` where none does."""
    at = bisect_left(sizes, count)
    return sizes[at] if at < len(sizes) else otherwise
