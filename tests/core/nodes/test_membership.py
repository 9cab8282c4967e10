from itertools import combinations

import pytest

from qdist.core.nodes.membership import why_waiting


@pytest.mark.parametrize(
    ("there", "before", "least", "goes_on"),
    [
        ((0,), (), 1, True),
        ((0,), (), 2, False),
        ((0, 1), (0, 1, 2), 1, True),
        ((1, 2), (0, 1, 2), 1, True),
        ((1, 2), (0, 1, 2), 3, False),
        ((2,), (0, 1, 2), 1, False),
        ((0,), (0, 1), 1, True),
        ((1,), (0, 1), 1, False),
        ((1,), (1, 0), 1, True),
        ((0, 1), (1,), 1, True),
        ((0,), (1,), 1, False),
        ((2, 3), (0, 1, 2, 3), 1, False),
        ((0, 3), (0, 1, 2, 3), 1, True),
    ],
)
def test_those_who_see_each_other_go_on_if_they_are_enough(
    there: tuple[int, ...], before: tuple[int, ...], least: int, goes_on: bool
) -> None:
    assert (why_waiting(there, before, least) == "") is goes_on


@pytest.mark.parametrize("count", range(1, 7))
def test_of_two_parts_never_both_go_on(count: int) -> None:
    everyone = tuple(range(count))
    for size in range(count + 1):
        for part in combinations(everyone, size):
            rest = tuple(node for node in everyone if node not in part)
            assert why_waiting(part, everyone, 1) or why_waiting(rest, everyone, 1)


def test_the_reason_counts() -> None:
    assert why_waiting((1,), (0, 1, 2), 1).startswith("1 of the 3 nodes that worked last is there")
    assert why_waiting((0,), (), 2) == "1 node of 2 that the run needs is there"
