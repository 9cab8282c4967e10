"""How many positions and learned tokens has the fullest micro-batch that a run will see?"""

import math
from collections.abc import Iterator

import torch

from qdist.core.plan import Fullest
from qdist.core.spec import RunSpec
from qdist.runtime.batches import padded, sample_order
from qdist.runtime.tokenized import IGNORED, TokenizedSet

_MOST_RANKS = 8
_MOST_SAMPLES = 1 << 18
"""Of the run, from its start, that are looked at: a later micro-batch is hardly fuller than the fullest of so many."""


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
    """Both [micro-batches of a rank, ranks, samples]: ranks take turns, micro-batch by micro-batch."""
    samples = lengths.shape[2]
    return Fullest(
        samples=samples,
        positions=tuple(samples * padded(longest) for longest in lengths.amax(dim=(0, 2)).tolist()),
        learned=tuple(learned.sum(dim=2).amax(dim=0).tolist()),
    )


def _learned(tokenized: TokenizedSet) -> torch.Tensor:
    """Tokens of each sample that have a loss; the first of a sample never has."""
    counts = (tokenized.labels != IGNORED).to(torch.int64)
    counts[tokenized.offsets[:-1]] = 0
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return before[tokenized.offsets[1:]] - before[tokenized.offsets[:-1]]


def _divisors(number: int) -> Iterator[int]:
    return (size for size in range(1, number + 1) if number % size == 0)
