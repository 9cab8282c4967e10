"""How sure can one be of a mean, and that two models differ by more than chance?"""

import math
from collections.abc import Sequence
from random import Random
from statistics import NormalDist
from typing import NamedTuple

_DRAWS = 1000
"""Samples drawn anew for an interval: its ends move by some 2 % of its width from seed to seed."""
_FLIPS = 4000
"""Assignments of signs that a test tries."""
_MOST_BLOCKS = 1000
"""Outcomes that are drawn one by one; more are first summed in as many blocks, at random: the variance is the same."""
_SEED = 0
_Z = 1.959963984540054
"""Standard normal quantile of 97.5 %."""
_LEVEL = 0.95


class Interval(NamedTuple):
    """Where a figure lies with 95 % confidence."""

    low: float
    high: float


class Shift(NamedTuple):
    """By how much the mean of second outcomes exceeds that of first ones, over the same items."""

    mean: float
    interval: Interval
    chance: float
    """Probability of a difference as large in either direction if the two were alike (a p value)."""


def mean_of(outcomes: Sequence[float], weights: Sequence[float] = ()) -> float:
    """Their mean, weighted where there are weights. At least one outcome."""
    if not weights:
        return math.fsum(outcomes) / len(outcomes)
    return math.fsum(map(_product, outcomes, weights)) / math.fsum(weights)


def interval_of_mean(outcomes: Sequence[float], weights: Sequence[float] = ()) -> Interval | None:
    """95 % interval of a mean; None of fewer than two outcomes.

    Shares of right answers have Wilson's (1927), which needs no draws and is right near 0 and 1; others the
    bootstrap's.
    """
    if len(outcomes) < 2:
        return None
    if not weights and all(outcome in (0, 1) for outcome in outcomes):
        return wilson(math.fsum(outcomes), len(outcomes))
    return _bootstrapped(_blocks(outcomes, weights))


def wilson(right: float, count: int) -> Interval:
    """95 % interval of a share. right: how many of `count` are; half ones are ties."""
    share, z2 = right / count, _Z * _Z / count
    middle, half = share + z2 / 2, _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    low, high = (middle - half) / (1 + z2), (middle + half) / (1 + z2)
    return Interval(low if right > 0 else 0.0, high if right < count else 1.0)


def shift_of_means(first: Sequence[float], second: Sequence[float], weights: Sequence[float] = ()) -> Shift | None:
    """The difference of two means over the same items, paired; None of fewer than two.

    Its interval is the bootstrap's over items. Its chance is that of the test that flips signs of differences: of right
    and wrong answers this is McNemar's, which is exact.
    Raises ValueError where the numbers of outcomes differ.
    """
    differences = [own - other for other, own in zip(first, second, strict=True)]
    if len(differences) < 2:
        return None
    blocks = _blocks(differences, weights)
    return Shift(mean_of(differences, weights), _bootstrapped(blocks), _chance(differences, weights))


class _Block(NamedTuple):
    """Some items: the sum of their weighted outcomes, and that of their weights."""

    total: float
    weight: float


def _product(outcome: float, weight: float) -> float:
    return outcome * weight


def _blocks(outcomes: Sequence[float], weights: Sequence[float]) -> list[_Block]:
    items = [_Block(o * w, w) for o, w in zip(outcomes, weights or [1.0] * len(outcomes), strict=True)]
    if len(items) <= _MOST_BLOCKS:
        return items
    Random(_SEED).shuffle(items)
    parts = (items[number::_MOST_BLOCKS] for number in range(_MOST_BLOCKS))
    return [_Block(math.fsum(own.total for own in part), math.fsum(own.weight for own in part)) for part in parts]


def _bootstrapped(blocks: Sequence[_Block]) -> Interval:
    """Percentiles of the means of samples drawn with replacement (Efron 1979), further out where blocks are few."""
    random = Random(_SEED)
    alike = len({own.weight for own in blocks}) == 1
    if alike:
        ratios = [own.total / own.weight for own in blocks]
        means = [sum(random.choices(ratios, k=len(ratios))) / len(ratios) for _ in range(_DRAWS)]
    else:
        drawn = (random.choices(blocks, k=len(blocks)) for _ in range(_DRAWS))
        means = [sum(own.total for own in sample) / sum(own.weight for own in sample) for sample in drawn]
    return percentiles(means, beyond=_share_beyond(len(blocks)))


def _share_beyond(count: int) -> float:
    """Share of draws beyond each end of the interval of a mean of `count` outcomes (Hesterberg 2015, section 4.2).

    Plain percentiles are too narrow for few: they hold the truth 89 times of 100 where `count` is 8, these 95 times.
    """
    freedom, z = count - 1, _Z
    # Student's quantile, by the first terms of Cornish and Fisher's expansion.
    student = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return NormalDist().cdf(-student * math.sqrt(count / freedom))


def percentiles(draws: Sequence[float], *, beyond: float = (1 - _LEVEL) / 2) -> Interval:
    """The middle 95 % of draws. beyond: share of them beyond each end."""
    ordered = sorted(draws)
    cut = round(beyond * (len(ordered) - 1))
    return Interval(ordered[cut], ordered[-1 - cut])


def _chance(differences: Sequence[float], weights: Sequence[float]) -> float:
    """The share of all assignments of signs whose sum is as far from 0 as that of the differences."""
    moved = [own.total for own in _blocks(differences, weights) if own.total]
    if len(moved) == 0:
        return 1.0
    unweighted = [difference for difference in differences if difference] if not weights else moved
    if len({abs(difference) for difference in unweighted}) == 1:
        return binomial_chance(sum(difference > 0 for difference in unweighted), len(unweighted))
    return _flipped(moved)


def binomial_chance(heads: int, count: int) -> float:
    """Probability that as many or as few of `count` fair coins, or more extreme, show heads; two-sided."""
    fewest, term, total = min(heads, count - heads), 1, 0
    for number in range(fewest + 1):
        total += term
        term = term * (count - number) // (number + 1)
    extreme: float = 2 * total / (1 << count)
    return min(1.0, extreme)


def _flipped(moved: Sequence[float]) -> float:
    random, reached = Random(_SEED), abs(sum(moved)) * (1 - 1e-12)
    whole = sum(moved)
    extreme = 0
    for _ in range(_FLIPS):
        signs = random.getrandbits(len(moved))
        turned = sum(value for place, value in enumerate(moved) if signs >> place & 1)
        extreme += abs(whole - 2 * turned) >= reached
    return (1 + extreme) / (1 + _FLIPS)
