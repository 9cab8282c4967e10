"""Are lengths counted into few bars, and is it told what training would refuse?"""

from typing import Any

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
    ("more", "refused"),
    [
        ({"samples": 3}, False),
        ({"samples": 3, "bad": 1}, True),
        ({"samples": 1, "bad": 2, "allowed_bad": 2}, False),
        ({"samples": 0}, True),
        ({"samples": 0, "unread": 4}, False),
        ({"samples": 1, "refusal": "1 sample cannot be split"}, True),
    ],
)
def test_data_that_training_would_refuse_are_known(more: dict[str, Any], refused: bool) -> None:
    assert Overview(source="d", records=4, **more).refused is refused
