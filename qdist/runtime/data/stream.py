"""Which samples are those of a step? An endless stream of them, known by seed and position alone."""

import hashlib
from functools import lru_cache
from typing import Protocol

import torch

from qdist.core.errors import DataError
from qdist.core.planning.plan import held_out_of


class SampleStream(Protocol):
    """An endless order of training samples.

    Whoever knows a position can go on from there, with any number of ranks: nothing is remembered between calls.
    """

    def take(self, position: int, count: int) -> list[int]:
        """The samples from `position` up to `position + count`, as indices into the tokenized set."""


class ShuffledEpochs:
    """Epochs of one data set, each in an order of its own."""

    def __init__(self, train: torch.Tensor, *, seed: int) -> None:
        """train: int64 indices of the samples to train on."""
        self._train, self._seed = train, seed

    def take(self, position: int, count: int) -> list[int]:
        order = sample_order(len(self._train), seed=self._seed, position=position, count=count)
        taken: list[int] = self._train[order].tolist()
        return taken


def split(n: int, *, held_out: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The training samples and the held-out samples: int64 indices, each in data order.

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


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int) -> torch.Tensor:
    """A shuffled range(n), cached because consecutive steps ask for the same epoch. Do not modify it."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _derived(seed: int, purpose: int | str) -> int:
    """A separate seed for each purpose: with seed + epoch, seed 1 would repeat seed 0's next epoch."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "big")


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """Dropout seed of one micro-batch: independent of the rank that computes it and of resuming."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {index}".encode()).digest()[:8], "big") >> 1
