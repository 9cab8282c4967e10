"""Windows over a long text."""

import pytest

from qdist.core.evaluation.windows import windows


@pytest.mark.parametrize("stride", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 16, 17, 23])
def test_overlapping_windows_predict_each_token_but_the_first_once(count: int, stride: int) -> None:
    window, text = 8, [100 + place for place in range(count)]
    targets = [target for item in windows(text, window=window, stride=stride) for target in item.targets]
    lost = text[:1] if stride < window else text[::window]
    assert targets == [token for token in text if token not in lost]


def test_a_target_is_the_token_behind_its_position() -> None:
    text = list(range(100, 120))
    for item in windows(text, window=6, stride=4):
        assert len(item.tokens) <= 6
        for position, target in zip(item.positions, item.targets, strict=True):
            assert item.tokens[position] == target - 1
            assert position == len(item.tokens) - 1 or item.tokens[position + 1] == target


def test_with_disjoint_windows_nothing_predicts_the_first_token_of_any() -> None:
    found = list(windows(range(10), window=4, stride=4))
    assert [item.tokens for item in found] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert [item.targets for item in found] == [(1, 2, 3), (5, 6, 7), (9,)]
