"""Which samples are those of a step? An endless stream of them, known by seed and position alone."""

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import torch

from qdist.core.data.sources import block_of, drawn, epoch_of
from qdist.core.errors import DataError
from qdist.core.planning.plan import Part, held_out_of


class SampleStream(Protocol):
    """An endless order of training samples.

    Whoever knows a position can go on from there, with any number of ranks: nothing is remembered between calls.
    """

    @property
    def epoch(self) -> int:
        """Number of samples of an epoch."""

    def take(self, position: int, count: int) -> list[int]:
        """The samples from `position` up to `position + count`, as indices into the tokenized set."""


def _shuffled(n: int, seed: int) -> torch.Tensor:
    """A shuffled range(n). Do not modify it: callers cache it, because consecutive steps ask for the same epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


class ShuffledEpochs:
    """Epochs of one data set, each in an order of its own."""

    def __init__(self, train: torch.Tensor, *, seed: int) -> None:
        """train: int64 indices of the samples to train on."""
        self._train, self._seed = train, seed
        self._shuffled = lru_cache(maxsize=2)(_shuffled)  # an epoch, and the next where a step takes of both

    @property
    def epoch(self) -> int:
        return len(self._train)

    def take(self, position: int, count: int) -> list[int]:
        order = sample_order(len(self._train), seed=self._seed, position=position, count=count, shuffled=self._shuffled)
        taken: list[int] = self._train[order].tolist()
        return taken


class MixedEpochs:
    """Several sources, each in epochs of its own, in exact proportions.

    Every block of `block_of(weights)` samples, 1,000 for most, has each source's share of it, rounded so that no error
    adds up. Within a block each source is spread evenly, but at random: of any first part of the stream its share is
    exact up to a few samples. A source that is used up begins again in a new order.
    """

    def __init__(self, parts: Sequence[torch.Tensor], weights: Sequence[float], *, seed: int) -> None:
        """parts: int64 indices of the samples of each source."""
        self._sources = [
            ShuffledEpochs(part, seed=_derived(seed, f"source {number}")) for number, part in enumerate(parts)
        ]
        self._weights, self._size, self._seed = tuple(weights), block_of(weights), seed
        self._block = lru_cache(maxsize=2)(self._made)

    @property
    def epoch(self) -> int:
        return epoch_of([source.epoch for source in self._sources], self._weights)

    def take(self, position: int, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            block, start = divmod(position + len(taken), self._size)
            taken += self._block(block)[start : start + count - len(taken)]
        return taken

    def _made(self, block: int) -> list[int]:
        """The samples of a block."""
        before, after = (drawn(number * self._size, self._weights) for number in (block, block + 1))
        generator = torch.Generator().manual_seed(_derived(self._seed, f"block {block}"))
        samples, places = list[int](), list[torch.Tensor]()
        for source, start, stop in zip(self._sources, before, after, strict=True):
            count = stop - start
            samples += source.take(start, count)
            places.append((torch.arange(count) + torch.rand(count, generator=generator)) / max(1, count))
        order = torch.cat(places).argsort(stable=True)
        mixed: list[int] = torch.tensor(samples)[order].tolist()
        return mixed


def stream_of(train: torch.Tensor, parts: Sequence[Part], *, seed: int) -> SampleStream:
    """The stream of a run's training samples. train: int64 indices, as `divide` gives them.

    Raises DataError for a weighted source that has no sample to train on.
    """
    weighted = [part for part in parts if part.weight is not None]
    if not weighted:
        return ShuffledEpochs(train, seed=seed)
    own = [train[(train >= part.first) & (train < part.stop)] for part in weighted]
    for part, samples in zip(weighted, own, strict=True):
        if not len(samples):
            raise DataError(f"{part.name} has no sample to train on", try_="leave it out, or hold out fewer records")
    return MixedEpochs(own, [part.weight or 0.0 for part in weighted], seed=seed)


def divide(n: int, parts: Sequence[Part], *, held_out: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The training samples and the held-out samples of `n`: int64 indices, each in data order.

    They are those of the sources that are evaluated on, if there are any; else `split` chooses them.
    Raises DataError if there is nothing to train or to evaluate on.
    """
    evaluated = [part for part in parts if part.held_out]
    if not evaluated:
        return split(n, held_out=held_out, seed=seed)
    kept = torch.cat([torch.arange(part.first, part.stop) for part in evaluated])
    names = " and ".join(part.name for part in evaluated)
    if not len(kept):
        raise DataError(f"{names} has no sample to evaluate on", try_="another --eval-data")
    if len(kept) == n:
        raise DataError("there is no sample to train on", try_="records with an answer that is to be learned")
    return torch.arange(n - len(kept)), kept


def split(n: int, *, held_out: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The training samples and the held-out samples: int64 indices, each in data order.

    held_out: the share to hold out, or from 1 on their number; at least one where it is above 0, and never all.

    Raises DataError when there is no sample to hold out without leaving none to train on.
    """
    if held_out < 0:
        raise DataError(
            f"{held_out:g} cannot be held out", try_="a share below 1, such as 0.05, or a number of records"
        )
    if held_out >= max(1, n):
        fewer = f"--set train.held_out={n // 10}"
        raise DataError(f"train.held_out={held_out:g} leaves none of {n:,} samples to train on", try_=fewer)
    if held_out and n < 2:
        raise DataError(f"{n} sample cannot be split into training and held-out data", try_="--set train.held_out=0")
    count = held_out_of(n, held_out)
    order = _shuffled(n, _derived(seed, "split"))
    return order[count:].sort().values, order[:count].sort().values


def sample_order(
    n_train: int,
    *,
    seed: int,
    position: int,
    count: int,
    shuffled: Callable[[int, int], torch.Tensor] = _shuffled,
) -> list[int]:
    """Samples `position` up to `position + count` of the endless stream of epochs, each in its own shuffled order.

    A function of its arguments alone: whoever knows the position can go on, with any number of ranks.
    shuffled: `_shuffled`, or the same with a cache of the caller's.
    """
    if n_train < 1:
        raise DataError("there is no sample to train on")
    order: list[int] = []
    while len(order) < count:
        epoch, start = divmod(position + len(order), n_train)
        order += shuffled(n_train, _derived(seed, epoch))[start : start + count - len(order)].tolist()
    return order


def _derived(seed: int, purpose: int | str) -> int:
    """A separate seed for each purpose: with seed + epoch, seed 1 would repeat seed 0's next epoch."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "big")


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """Dropout seed of one micro-batch: independent of the rank that computes it and of resuming."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {index}".encode()).digest()[:8], "big") >> 1
