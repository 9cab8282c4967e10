"""The samples of a step follow from the seed and the position alone."""

import pytest
import torch

from qdist.core.errors import DataError
from qdist.runtime.data.batches import collate, sample_order, split
from qdist.runtime.data.tokenized import IGNORED, Summary, TokenizedSet, learned_tokens


def set_of(*samples: list[int]) -> TokenizedSet:
    """Samples of the given token ids; negative ones are tokens without loss."""
    flat = torch.tensor([token for sample in samples for token in sample], dtype=torch.int32)
    ends = torch.tensor([0, *(len(sample) for sample in samples)]).cumsum(0)
    summary = Summary(records=len(samples), dropped=0, truncated=0, tokens=len(flat), learned_tokens=0)
    return TokenizedSet(flat.abs(), torch.where(flat > 0, flat, IGNORED), ends, summary)


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


def test_a_micro_batch_is_padded_on_the_right_to_a_multiple_of_8() -> None:
    batch = collate([2, 0], set_of([-1, 2, 3], [4] * 9, [-5, 6]), pad_id=7)
    assert batch["input_ids"].tolist() == [[5, 6] + [7] * 6, [1, 2, 3] + [7] * 5]
    assert batch["attention_mask"].tolist() == [[1] * 2 + [0] * 6, [1] * 3 + [0] * 5]
    assert batch["labels"].tolist() == [[IGNORED, 6] + [IGNORED] * 6, [IGNORED, 2, 3] + [IGNORED] * 5]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert collate([1], set_of([], [4] * 9), pad_id=0)["input_ids"].shape == (1, 16)


def test_learned_tokens_are_those_the_shifted_loss_counts() -> None:
    tokenized = set_of([1, 2, 3], [-1, 2, -3], [4], [-5, -6])
    counts = [learned_tokens(tokenized, [index]) for index in range(4)]
    assert counts == [2, 1, 0, 0]
    assert learned_tokens(tokenized, range(4)) == 3
    for index, count in enumerate(counts):
        labels = collate([index], tokenized, pad_id=0)["labels"]
        assert int((labels[:, 1:] != IGNORED).sum()) == count
