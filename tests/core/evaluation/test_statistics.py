"""Are intervals and tests those of the books, and do they hold what they promise?"""

import math
from random import Random

import pytest

from qdist.core.evaluation.statistics import (
    binomial_chance,
    interval_of_mean,
    mean_of,
    shift_of_means,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (500, 1000, 0.4691, 0.5309)],
)
def test_shares_have_wilsons_interval(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)
    assert interval_of_mean([1.0] * right + [0.0] * (count - right)) == wilson(right, count)


def test_the_bootstraps_interval_is_the_normal_one_of_many_outcomes() -> None:
    random = Random(1)
    outcomes = [random.gauss(5, 2) for _ in range(900)]
    low, high = interval_of_mean(outcomes) or (0, 0)
    half = 1.96 * 2 / math.sqrt(900)
    assert low == pytest.approx(mean_of(outcomes) - half, abs=0.03)
    assert high == pytest.approx(mean_of(outcomes) + half, abs=0.03)


@pytest.mark.parametrize("count", [300, 5000])
def test_weights_count_as_that_many_items(count: int) -> None:
    random = Random(2)
    outcomes = [random.random() for _ in range(count)]
    weights = [random.choice((1.0, 3.0)) for _ in outcomes]
    low, high = interval_of_mean(outcomes, weights) or (0, 0)
    mean = mean_of(outcomes, weights)
    residuals = [w * (o - mean) for o, w in zip(outcomes, weights, strict=True)]
    half = 1.96 * math.sqrt(sum(r * r for r in residuals)) / sum(weights)  # the ratio estimator's variance
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.15 * half)


def test_intervals_hold_the_truth_19_times_of_20() -> None:
    random, held = Random(3), 0
    for _ in range(100):
        low, high = interval_of_mean([random.expovariate(1) for _ in range(60)]) or (0, 0)
        held += low <= 1 <= high
    assert 88 <= held <= 99


def test_intervals_of_few_outcomes_are_as_wide_as_they_have_to_be() -> None:
    random, held = Random(3), 0
    for _ in range(100):
        low, high = interval_of_mean([random.gauss(1, 1) for _ in range(8)]) or (0, 0)
        held += low <= 1 <= high
    assert held >= 93


def test_nothing_is_said_of_a_single_outcome() -> None:
    assert interval_of_mean([1.0]) is None
    assert shift_of_means([1.0], [0.0]) is None


@pytest.mark.parametrize(
    ("heads", "count", "chance"), [(5, 5, 0.0625), (0, 6, 0.03125), (5, 10, 1.0), (9, 10, 22 / 1024), (0, 0, 1.0)]
)
def test_coins_are_counted_exactly(heads: int, count: int, chance: float) -> None:
    assert binomial_chance(heads, count) == chance


def test_right_and_wrong_answers_have_mcnemars_exact_test() -> None:
    first = [1.0] * 50 + [0.0] * 10 + [1.0] * 2
    second = [1.0] * 50 + [1.0] * 10 + [0.0] * 2
    shift = shift_of_means(first, second)
    assert shift is not None
    assert shift.mean == pytest.approx(8 / 62)
    assert shift.chance == binomial_chance(10, 12)
    assert shift.interval.low > 0


def test_thousands_of_discordant_answers_do_not_overflow() -> None:
    assert 0 < binomial_chance(2700, 5000) < 1e-6


def test_alike_models_differ_by_chance_alone() -> None:
    shift = shift_of_means([0.5, 0.25, 1.0], [0.5, 0.25, 1.0])
    assert shift is not None
    assert (shift.mean, shift.chance) == (0.0, 1.0)


def test_a_small_steady_gain_is_more_than_chance_though_the_intervals_overlap() -> None:
    random = Random(4)
    first = [random.gauss(2.5, 1) for _ in range(400)]
    second = [value - 0.05 + random.gauss(0, 0.1) for value in first]
    weights = [random.randint(20, 500) for _ in first]
    shift = shift_of_means(first, second, weights)
    assert shift is not None
    assert shift.chance < 0.001
    assert shift.interval.low < -0.05 < shift.interval.high < 0
    assert (interval_of_mean(first) or (0, 0))[0] < (interval_of_mean(second) or (0, 0))[1]


def test_two_items_never_show_more_than_chance() -> None:
    shift = shift_of_means([0.1, 0.2], [0.8, 0.7])
    assert shift is not None
    assert shift.chance > 0.4


def test_the_same_is_said_each_time() -> None:
    outcomes = [0.1 * number for number in range(40)]
    assert interval_of_mean(outcomes) == interval_of_mean(outcomes)


@pytest.mark.parametrize("count", range(1, 60))
def test_an_interval_of_no_or_all_right_answers_ends_at_them_exactly(count: int) -> None:
    assert wilson(0, count).low == 0.0
    assert wilson(count, count).high == 1.0
