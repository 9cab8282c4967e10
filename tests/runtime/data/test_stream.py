"""The samples of a step follow from the seed and the position alone."""

from collections import Counter

import pytest
import torch

from qdist.core.errors import DataError
from qdist.core.planning.plan import Part
from qdist.runtime.data.stream import (
    MixedEpochs,
    ShuffledEpochs,
    divide,
    micro_batch_seed,
    sample_order,
    split,
    stream_of,
)


@pytest.mark.parametrize(
    ("n", "held_out", "held"),
    [(100, 0.05, 5), (100, 0.001, 1), (100, 0.0, 0), (2, 0.9, 1), (1, 0.0, 0), (100, 1, 1), (100, 99, 99)],
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


@pytest.mark.parametrize(("n", "held_out"), [(1, 0.1), (0, 0.1), (10, 10.0), (10, 200.0), (10, -0.1)])
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


A, B = torch.arange(0, 40), torch.arange(40, 100)
SEVEN_TO_THREE = (0.7, 0.3)


def part(name: str, first: int, samples: int, weight: float | None = None, *, held_out: bool = False) -> Part:
    return Part(name=name, first=first, samples=samples, weight=weight, held_out=held_out)


def test_every_block_of_a_mixture_has_its_exact_shares() -> None:
    mixed = MixedEpochs((A, B), SEVEN_TO_THREE, seed=3)
    for block in range(3):
        taken = mixed.take(1000 * block, 1000)
        assert sum(sample < 40 for sample in taken) == 700
    orders = [[sample < 40 for sample in mixed.take(1000 * block, 1000)] for block in range(3)]
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("position", [10, 100, 512, 4321])
def test_of_any_part_of_a_mixture_the_shares_are_exact_up_to_a_sample(position: int) -> None:
    taken = MixedEpochs((A, B), SEVEN_TO_THREE, seed=9).take(0, position)
    assert abs(sum(sample < 40 for sample in taken) - 0.7 * position) <= 2


def test_each_source_of_a_mixture_is_used_up_before_it_begins_again() -> None:
    taken = MixedEpochs((A, B), SEVEN_TO_THREE, seed=3).take(0, 2000)
    of_a, of_b = [sample for sample in taken if sample < 40], [sample for sample in taken if sample >= 40]
    assert (len(of_a), len(of_b)) == (1400, 600)
    for own, size in ((of_a, 40), (of_b, 60)):
        epochs = [own[start : start + size] for start in range(0, len(own), size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("step", [1, 16, 333, 1500])
def test_a_mixture_is_the_same_in_pieces_of_any_size(step: int) -> None:
    whole = MixedEpochs((A, B), SEVEN_TO_THREE, seed=5).take(0, 3000)
    anew = [MixedEpochs((A, B), SEVEN_TO_THREE, seed=5).take(at, min(step, 3000 - at)) for at in range(0, 3000, step)]
    assert [sample for piece in anew for sample in piece] == whole


def test_killed_in_mid_epoch_and_resumed_on_other_ranks_every_sample_comes_as_often_as_planned() -> None:
    """Steps of 12 samples by 2 ranks up to a kill, then by 3 ranks, each of which makes a stream of its own."""
    samples, epoch = Counter[int](), MixedEpochs((A, B), SEVEN_TO_THREE, seed=7).epoch
    assert epoch == 200  # 60 of B are three tenths of it
    for step in range(epoch // 10):
        ranks = 2 if step < 7 else 5
        for rank in range(ranks):
            samples.update(MixedEpochs((A, B), SEVEN_TO_THREE, seed=7).take(step * 10, 10)[rank::ranks])
    planned = Counter(MixedEpochs((A, B), SEVEN_TO_THREE, seed=7).take(0, epoch))
    assert samples == planned


def test_weights_that_are_no_tenths_add_up_to_no_error() -> None:
    taken = MixedEpochs((A, B, torch.arange(100, 110)), (1, 1, 1), seed=0).take(0, 3000)
    assert Counter((sample >= 40) + (sample >= 100) for sample in taken) == {0: 1000, 1: 1000, 2: 1000}


def test_the_order_of_a_mixture_never_changes_between_releases() -> None:
    assert MixedEpochs((A, B), SEVEN_TO_THREE, seed=0).take(0, 12) == [14, 38, 73, 36, 64, 4, 39, 24, 0, 46, 22, 62]


def test_sources_with_weights_are_mixed_and_others_shuffled_together() -> None:
    weighted = (part("a", 0, 40, 0.7), part("b", 40, 60, 0.3))
    train = torch.arange(0, 100, 2)
    mixed = stream_of(train, weighted, seed=1)
    assert isinstance(mixed, MixedEpochs)
    assert mixed.epoch == 100
    assert len(set(mixed.take(0, 100))) >= len(train) - 2
    plain = stream_of(train, (part("a", 0, 40), part("b", 40, 60)), seed=1)
    assert isinstance(plain, ShuffledEpochs)
    assert sorted(plain.take(0, plain.epoch)) == train.tolist()


def test_a_weighted_source_without_samples_is_refused() -> None:
    with pytest.raises(DataError, match="b has no sample to train on"):
        stream_of(torch.arange(40), (part("a", 0, 40, 0.7), part("b", 40, 0, 0.3)), seed=1)


def test_sources_to_evaluate_on_are_what_is_held_out() -> None:
    parts = (part("a", 0, 6), part("b", 6, 2), part("c", 8, 3, held_out=True))
    train, held_out = divide(11, parts, held_out=0.5, seed=0)
    assert train.tolist() == list(range(8))
    assert held_out.tolist() == [8, 9, 10]
    whole, half = divide(11, parts[:2], held_out=4, seed=0)
    assert (len(whole), len(half)) == (7, 4)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((part("a", 0, 3), part("c", 3, 0, held_out=True)), "c has no sample to evaluate on"),
        ((part("a", 0, 0), part("c", 0, 3, held_out=True)), "there is no sample to train on"),
    ],
)
def test_nothing_to_train_or_evaluate_on_is_refused(parts: tuple[Part, ...], said: str) -> None:
    with pytest.raises(DataError, match=said):
        divide(3, parts, held_out=0.1, seed=0)
