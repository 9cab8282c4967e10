"""The samples of a step follow from the seed and the position alone."""

import pytest

from qdist.core.errors import DataError
from qdist.runtime.data.stream import ShuffledEpochs, micro_batch_seed, sample_order, split


@pytest.mark.parametrize(
    ("n", "held_out", "held"), [(100, 0.05, 5), (100, 0.001, 1), (100, 0.0, 0), (2, 0.9, 1), (1, 0.0, 0)]
)
def test_a_split_parts_all_samples_in_their_order(n: int, held_out: float, held: int) -> None:
    train, kept = split(n, held_out=held_out, seed=1)
    assert len(kept) == held
    assert sorted(train.tolist() + kept.tolist()) == list(range(n))
    assert train.tolist() == sorted(train.tolist())
    assert kept.tolist() == sorted(kept.tolist())


def test_a_split_follows_its_seed() -> None:
    held = [split(100, held_out=0.1, seed=seed)[1].tolist() for seed in (1, 1, 2)]
    assert held[0] == held[1] != held[2]


@pytest.mark.parametrize(("n", "held_out"), [(1, 0.1), (0, 0.1), (10, 1.0), (10, -0.1)])
def test_a_split_that_leaves_nothing_is_refused(n: int, held_out: float) -> None:
    with pytest.raises(DataError):
        split(n, held_out=held_out, seed=0)


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own() -> None:
    epochs = [sample_order(10, seed=0, position=10 * epoch, count=10) for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("step", [1, 3, 8, 25])
def test_the_stream_is_the_same_in_pieces_of_any_size(step: int) -> None:
    whole = sample_order(7, seed=5, position=0, count=50)
    pieces = [sample_order(7, seed=5, position=at, count=min(step, 50 - at)) for at in range(0, 50, step)]
    assert [index for piece in pieces for index in piece] == whole


def test_another_seed_does_not_repeat_a_later_epoch() -> None:
    first = [sample_order(20, seed=0, position=20 * epoch, count=20) for epoch in range(4)]
    assert sample_order(20, seed=1, position=0, count=20) not in first


def test_the_order_never_changes_between_releases() -> None:
    assert sample_order(6, seed=0, position=0, count=12) == [1, 2, 5, 3, 0, 4, 5, 3, 1, 4, 2, 0]
    assert split(8, held_out=0.25, seed=0)[1].tolist() == [6, 7]


def test_no_sample_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="no sample to train on"):
        sample_order(0, seed=0, position=0, count=1)


def test_a_stream_takes_training_samples_alone() -> None:
    train, held_out = split(20, held_out=0.2, seed=3)
    taken = ShuffledEpochs(train, seed=3).take(0, 32)
    assert sorted(taken[:16]) == sorted(taken[16:]) == train.tolist()
    assert not set(taken) & set(held_out.tolist())


def test_every_micro_batch_has_a_dropout_seed_of_its_own() -> None:
    seeds = {micro_batch_seed(seed, step, index) for seed in range(4) for step in range(20) for index in range(20)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**63 for seed in seeds)
