"""Samples as tensors: a row each, or packed into one; and the positions that have a loss."""

import pytest
import torch

from qdist.runtime.data.batches import collate, collate_bin, pick
from qdist.runtime.data.bins import BinSize
from qdist.runtime.data.tokenized import IGNORED, Summary, TokenizedSet, learned_tokens


def set_of(*samples: list[int]) -> TokenizedSet:
    """Samples of the given token ids; negative ones are tokens without loss."""
    flat = torch.tensor([token for sample in samples for token in sample], dtype=torch.int32)
    ends = torch.tensor([0, *(len(sample) for sample in samples)]).cumsum(0)
    summary = Summary(records=len(samples), dropped=0, truncated=0, tokens=len(flat), learned_tokens=0)
    return TokenizedSet(flat.abs(), torch.where(flat > 0, flat, IGNORED), ends, summary)


def test_a_micro_batch_is_padded_on_the_right_to_a_multiple_of_8() -> None:
    batch = collate([2, 0], set_of([-1, 2, 3], [4] * 9, [-5, 6]), pad_id=7)
    assert batch["input_ids"].tolist() == [[5, 6] + [7] * 6, [1, 2, 3] + [7] * 5]
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["labels"].tolist() == [[IGNORED, 6] + [IGNORED] * 6, [IGNORED, 2, 3] + [IGNORED] * 5]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert collate([1], set_of([], [4] * 9), pad_id=0)["input_ids"].shape == (1, 16)
    assert collate([1], set_of([], [4] * 9), pad_id=0, width=24)["labels"].shape == (1, 24)


def test_a_bin_holds_samples_one_behind_the_other_and_cuts_its_padding_into_pieces() -> None:
    tokenized = set_of([1, 2, 3], [-4, 5], [6] * 4)
    batch = collate_bin([2, 0], tokenized, pad_id=9, size=BinSize(positions=14, samples=3), longest=4)
    assert batch["input_ids"].tolist() == [[6, 6, 6, 6, 1, 2, 3, *[9] * 7]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 6, 6, IGNORED, 2, 3, *[IGNORED] * 7]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2]]
    assert batch["ends"].tolist() == [0, 4, 7, 11, 14, 14, 14, 14]
    assert batch["ends"].dtype == torch.int32


@pytest.mark.parametrize("samples", [[], [3], [0, 1, 2], [2]])
def test_every_bin_of_a_run_has_the_same_shapes(samples: list[int]) -> None:
    """Empty, filled by one sample, full of samples, and with one of which nothing is learned."""
    tokenized = set_of([1, 2, 3], [-4, 5], [-7, -7], [6] * 8)
    batch = collate_bin(samples, tokenized, pad_id=9, size=BinSize(positions=8, samples=3), longest=8)
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "input_ids": (1, 8), "labels": (1, 8), "positions": (1, 8), "ends": (5,),
    }  # fmt: skip
    assert int((batch["labels"] != IGNORED).sum()) == learned_tokens(tokenized, samples)
    assert batch["ends"][-1] == 8


def test_what_is_picked_is_the_position_before_each_label() -> None:
    labels = torch.tensor([[5, IGNORED, 6, 7], [IGNORED, 8, IGNORED, IGNORED]])
    assert {key: value.tolist() for key, value in pick(labels).items()} == {"picked": [1, 2, 4], "targets": [6, 7, 8]}


@pytest.mark.parametrize(("sizes", "found"), [((4, 6), 4), ((2, 6), 6), ((1, 2), 8), ((), 8)])
def test_picked_positions_come_in_few_sizes(sizes: tuple[int, ...], found: int) -> None:
    """If none is enough, all positions are."""
    labels = torch.tensor([[5, IGNORED, 6, 7], [IGNORED, 8, IGNORED, IGNORED]])
    learned = pick(labels, sizes)
    assert learned["picked"].tolist() == [1, 2, 4, *[0] * (found - 3)]
    assert learned["targets"].tolist() == [6, 7, 8, *[IGNORED] * (found - 3)]


def test_learned_tokens_are_those_the_shifted_loss_counts() -> None:
    tokenized = set_of([1, 2, 3], [-1, 2, -3], [4], [-5, -6])
    counts = [learned_tokens(tokenized, [index]) for index in range(4)]
    assert counts == [2, 1, 0, 0]
    assert learned_tokens(tokenized, range(4)) == 3
    for index, count in enumerate(counts):
        labels = collate([index], tokenized, pad_id=0)["labels"]
        assert int((labels[:, 1:] != IGNORED).sum()) == count
