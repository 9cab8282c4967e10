"""Are lengths counted into few bars, and is it told what training would refuse?"""

import pytest

from qdist.core.data.overview import Bar, Overview, histogram


@pytest.mark.parametrize(
    ("lengths", "bars"),
    [
        ([], ()),
        ([5, 5, 6], (Bar(5, 6, 2), Bar(6, 7, 1))),
        ([0, 12], tuple(Bar(low, low + 2, low in (0, 12)) for low in range(0, 14, 2))),
        ([100, 3000], tuple(Bar(low, low + 256, low in (0, 2816)) for low in range(0, 3072, 256))),
    ],
)
def test_lengths_are_counted_into_at_most_twelve_bars(lengths: list[int], bars: tuple[Bar, ...]) -> None:
    assert histogram(lengths) == bars
    assert len(bars) <= 12


@pytest.mark.parametrize(
    ("bad", "allowed", "samples", "refused"), [(0, 0, 3, False), (1, 0, 3, True), (2, 2, 1, False), (0, 0, 0, True)]
)
def test_data_with_more_bad_records_than_allowed_or_nothing_to_learn_are_refused(
    bad: int, allowed: int, samples: int, refused: bool
) -> None:
    assert Overview(source="d", records=4, bad=bad, allowed_bad=allowed, samples=samples).refused is refused
