"""A few sizes for all counts, with as little padding as so few can have."""

from itertools import combinations

import pytest

from qdist.runtime.data.sizes import few_sizes, padded, size_for


@pytest.mark.parametrize(
    "counts",
    [[3], [8, 8, 8], [1, 9, 17, 25, 33, 41], [5] * 90 + [400], [0, 12, 13, 60, 61, 62, 100, 180, 181], range(200)],
)
@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_other_sizes_would_have_less_padding(counts: list[int], most: int) -> None:
    found = few_sizes(counts, most=most)
    assert 0 < len(found) <= most
    assert found[-1] == padded(max(counts))
    assert all(size % 8 == 0 for size in found)
    choices = sorted({padded(max(1, count)) for count in counts})
    others = [each for each in combinations(choices, min(most, len(choices))) if each[-1] == choices[-1]]
    assert cost(counts, found) == min(cost(counts, each) for each in others)


def cost(counts: list[int], sizes: tuple[int, ...]) -> int:
    return sum(size_for(count, sizes, otherwise=0) for count in counts)


def test_sizes_of_long_rows_are_coarser_and_hold_the_longest() -> None:
    sizes = few_sizes(range(1, 8198))
    assert len(sizes) == 4
    assert sizes[-1] == 8200
    assert sizes[0] == pytest.approx(8200 / 4, rel=0.05)


def test_a_count_above_all_sizes_has_the_size_that_is_always_enough() -> None:
    assert [size_for(count, (8, 24), otherwise=64) for count in (0, 8, 9, 24, 25)] == [8, 8, 24, 24, 64]
