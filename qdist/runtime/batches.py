"""Which samples a step sees, and in what shape: functions of the seed and the position, never of the world size."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch

from qdist.core.errors import DataError
from qdist.core.plan import held_out_of
from qdist.runtime.tokenized import IGNORED, TokenizedSet

_WIDTH_MULTIPLE = 8
"""Tensor cores want matrix sides in multiples of 8 16-bit numbers."""


def split(n: int, *, held_out: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples to train on and the ones held out: int64 indices, each in the order of the data.

    held_out: the share to hold out; at least one sample where it is above 0, and never all.

    Raises DataError when there is no sample to hold out without leaving none to train on.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"the held-out share is {held_out}", try_="at least 0 and below 1, such as 0.05")
    if held_out and n < 2:
        raise DataError(f"{n} sample cannot be split into training and held-out data", try_="--set train.held_out=0")
    count = held_out_of(n, held_out)
    order = _permutation(n, _derived(seed, "split"))
    return order[count:].sort().values, order[:count].sort().values


def sample_order(n_train: int, *, seed: int, position: int, count: int) -> list[int]:
    """Samples `position` up to `position + count` of the endless stream of epochs, each in its own shuffled order.

    A function of its arguments alone: whoever knows the position can go on, with any number of ranks.
    """
    if n_train < 1:
        raise DataError("there is no sample to train on")
    order: list[int] = []
    while len(order) < count:
        epoch, start = divmod(position + len(order), n_train)
        order += _permutation(n_train, _derived(seed, epoch))[start : start + count - len(order)].tolist()
    return order


def width_of(samples: Sequence[int], tokenized: TokenizedSet) -> int:
    """Positions of each row of a micro-batch."""
    return padded(max(span.stop - span.start for span in map(tokenized.span, samples)))


def padded(longest: int) -> int:
    """Positions of each row where the longest sample has so many tokens."""
    return -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


def collate(samples: Sequence[int], tokenized: TokenizedSet, *, pad_id: int) -> dict[str, torch.Tensor]:
    """One micro-batch, padded on the right to its longest sample and on to a multiple of 8.

    Returns input_ids, attention_mask and labels, each int64 [samples, width].
    """
    spans = [tokenized.span(index) for index in samples]
    shape = (len(spans), width_of(samples, tokenized))
    batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED, dtype=torch.int64),
    }
    for row, span in enumerate(spans):
        length = span.stop - span.start
        batch["input_ids"][row, :length] = tokenized.tokens[span]
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, :length] = tokenized.labels[span]
    return batch


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int) -> torch.Tensor:
    """A shuffled range(n), kept because consecutive steps ask for the same epoch. Not to be written to."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _derived(seed: int, purpose: int | str) -> int:
    """A seed of its own for each purpose: seed + epoch would make seed 1 repeat what seed 0 does an epoch later."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "big")
