"""The samples of each step and of evaluation, and how full the fullest micro-batch is."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from qdist.core.errors import DataError
from qdist.core.planning.plan import Fullest, Plan, held_out_of
from qdist.core.spec.run_spec import RunSpec
from qdist.runtime.data.tokenized import IGNORED, Summary, TokenizedSet, learned_tokens, load

_WIDTH_MULTIPLE = 8
"""Row widths are multiples of this: Tensor Cores want matrix sides in multiples of 8 16-bit numbers."""


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


def width_of(samples: Sequence[int], tokenized: TokenizedSet) -> int:
    """Positions per row of a micro-batch."""
    return padded(max(span.stop - span.start for span in map(tokenized.span, samples)))


def padded(longest: int) -> int:
    """Positions per row if the longest sample has that many tokens."""
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
    """A shuffled range(n), cached because consecutive steps ask for the same epoch. Do not modify it."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _derived(seed: int, purpose: int | str) -> int:
    """A separate seed for each purpose: with seed + epoch, seed 1 would repeat seed 0's next epoch."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "big")


class Samples:
    """Micro-batches by step, determined by the plan and the step alone, never by earlier steps."""

    def __init__(self, plan: Plan, tokenized: TokenizedSet, *, pad_id: int) -> None:
        self.plan, self.tokenized, self.pad_id = plan, tokenized, pad_id
        self._train, held_out = split(len(tokenized), held_out=plan.spec.train.held_out, seed=plan.spec.seed)
        self.held_out: list[int] = held_out.tolist()

    def step(self, step: int) -> list[list[int]]:
        """Sample indices of a step, micro-batch by micro-batch, for all ranks together."""
        size = self.plan.spec.global_batch
        order = sample_order(len(self._train), seed=self.plan.spec.seed, position=step * size, count=size)
        chosen = self._train[order].tolist()
        return [chosen[start : start + self.plan.micro_batch] for start in range(0, size, self.plan.micro_batch)]

    def held_out_batches(self) -> list[list[int]]:
        """The held-out samples in micro-batches, in an order independent of the number of ranks."""
        size = self.plan.micro_batch
        return [self.held_out[start : start + size] for start in range(0, len(self.held_out), size)]

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """One micro-batch as padded tensors."""
        return collate(indices, self.tokenized, pad_id=self.pad_id)

    def learned(self, indices: Sequence[int]) -> int:
        """Number of tokens of these samples that have a loss."""
        return learned_tokens(self.tokenized, indices)

    def tokens(self, indices: Sequence[int]) -> int:
        """Number of tokens of these samples, without padding."""
        return sum(span.stop - span.start for span in map(self.tokenized.span, indices))

    def padding(self, indices: Sequence[int]) -> int:
        """Padding positions in a micro-batch of these samples."""
        return len(indices) * width_of(indices, self.tokenized) - self.tokens(indices)


def read_samples(plan: Plan, *, pad_id: int) -> Samples:
    """The plan's data set, memory-mapped from the token cache; random tokens if the run has none."""
    if plan.data is None or not plan.data.path:
        return Samples(plan, _random_tokens(plan), pad_id=pad_id)
    path = Path(plan.data.path)
    return Samples(plan, load(path, key=path.stem), pad_id=pad_id)


def _random_tokens(plan: Plan) -> TokenizedSet:
    """Full-length random samples, enough for 8 different steps, to try a model's shape without data."""
    count, length = 8 * plan.spec.global_batch, plan.spec.seq_len
    tokens = torch.randint(
        0,
        plan.facts.vocab,
        (count * length,),
        dtype=torch.int32,
        generator=torch.Generator().manual_seed(plan.spec.seed),
    )
    learned = count * (length - 1)
    summary = Summary(records=count, dropped=0, truncated=0, tokens=count * length, learned_tokens=learned)
    return TokenizedSet(tokens, tokens.clone(), torch.arange(count + 1) * length, summary)


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """Dropout seed of one micro-batch: independent of the rank that computes it and of resuming."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {index}".encode()).digest()[:8], "big") >> 1


_MOST_RANKS = 8
_MOST_SAMPLES = 1 << 18
"""Samples examined from the start of the run: later micro-batches are hardly fuller than the fullest of these."""


def fullest(tokenized: TokenizedSet, train: torch.Tensor, spec: RunSpec) -> tuple[Fullest, ...]:
    """The fullest micro-batch of each size that divides the global batch, by data-parallel rank, of up to 8 ranks.

    train: the samples to train on, as `batches.split` gives them.
    """
    size = spec.global_batch
    steps = spec.steps or math.ceil((spec.epochs or 1.0) * len(train) / size)
    count = size * max(1, min(steps, _MOST_SAMPLES // size))
    order = train[sample_order(len(train), seed=spec.seed, position=0, count=count)]
    lengths, learned = tokenized.offsets.diff()[order], _learned(tokenized)[order]
    return tuple(
        _of(lengths.view(-1, ranks, each), learned.view(-1, ranks, each))
        for each in _divisors(size)
        for ranks in _divisors(size // each)
        if ranks <= _MOST_RANKS
    )


def _of(lengths: torch.Tensor, learned: torch.Tensor) -> Fullest:
    """The fullest micro-batches; both inputs are [micro-batches of a rank, ranks, samples], ranks taking turns."""
    samples = lengths.shape[2]
    return Fullest(
        samples=samples,
        positions=tuple(samples * padded(longest) for longest in lengths.amax(dim=(0, 2)).tolist()),
        learned=tuple(learned.sum(dim=2).amax(dim=0).tolist()),
    )


def _learned(tokenized: TokenizedSet) -> torch.Tensor:
    """Number of tokens with a loss in each sample; a sample's first token never has one."""
    counts = (tokenized.labels != IGNORED).to(torch.int64)
    counts[tokenized.offsets[:-1]] = 0
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return before[tokenized.offsets[1:]] - before[tokenized.offsets[:-1]]


def _divisors(number: int) -> Iterator[int]:
    return (size for size in range(1, number + 1) if number % size == 0)
