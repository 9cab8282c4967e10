"""How full are the micro-batches of a run, of every size that a plan may choose? Told before it is planned."""

import math
from collections.abc import Iterator

import torch

from qdist.core.planning.fill import MOST_COUNTED
from qdist.core.planning.plan import Fill, Fullest
from qdist.core.spec.run_spec import RunSpec
from qdist.runtime.data.bins import bin_size, pack
from qdist.runtime.data.sizes import padded
from qdist.runtime.data.stream import SampleStream
from qdist.runtime.data.tokenized import TokenizedSet, learned_of_each

_MOST_RANKS = 8
_MOST_SAMPLES = 1 << 18
"""Samples examined from the start of the run: later micro-batches are hardly fuller than the fullest of these."""
_MOST_PACKED = 1 << 13
_MOST_STEPS = 200
"""Samples and steps that are packed for a mean: each size packs them anew, 8,192 samples in some 10 ms."""


def fullest(tokenized: TokenizedSet, stream: SampleStream, spec: RunSpec) -> tuple[Fullest, ...]:
    """The fullest micro-batch of each size that divides the global batch, by data-parallel rank, of up to 8 ranks.

    stream: the samples to train on, as `stream_of` gives them.
    """
    size = spec.batch
    order = _first(stream, spec, _MOST_SAMPLES)
    lengths, learned = tokenized.offsets.diff()[order], learned_of_each(tokenized)[order].long()
    return tuple(
        _of(lengths.view(-1, ranks, each), learned.view(-1, ranks, each))
        for each in _divisors(size)
        for ranks in _divisors(size // each)
        if ranks <= _MOST_RANKS
    )


def fills(tokenized: TokenizedSet, stream: SampleStream, spec: RunSpec) -> tuple[Fill, ...]:
    """How full packed micro-batches of 1 to 16 sequences are, for up to 8 ranks; none larger than a step needs.

    stream: as for `fullest`.
    """
    order = _first(stream, spec, min(_MOST_PACKED, _MOST_STEPS * spec.batch))
    lengths_of_all = tokenized.offsets.diff()
    steps: list[list[int]] = lengths_of_all[order].view(-1, spec.batch).tolist()
    seq_len = min(spec.seq_len, int(lengths_of_all.max()))
    mean, tokens = len(tokenized.tokens) / len(tokenized), sum(map(sum, steps)) / len(steps)
    found: list[Fill] = []
    for samples in range(1, MOST_COUNTED + 1):
        size = bin_size(micro_batch=samples, seq_len=seq_len, mean_length=mean)
        bins = [len(pack(lengths, size)) for lengths in steps]
        for ranks in range(1, _MOST_RANKS + 1):
            each = sum(-(-count // ranks) for count in bins) / len(bins)
            share = tokens / (each * ranks * size.positions)
            found.append(Fill(samples=samples, ranks=ranks, micro_batches=each, share=share))
        if max(bins) == 1:
            break
    return tuple(found)


def row_fills(tokenized: TokenizedSet, stream: SampleStream, spec: RunSpec) -> tuple[Fill, ...]:
    """How full micro-batches with a row a sample are, for each size that divides the global batch and any ranks.

    stream: as for `fullest`. Rows are as wide as they must be; few widths, where passes are captured, pad them further.
    """
    size = spec.batch
    lengths = tokenized.offsets.diff()[_first(stream, spec, _MOST_SAMPLES)]
    tokens, positions = int(lengths.sum()), {each: _row_positions(lengths.view(-1, each)) for each in _divisors(size)}
    return tuple(
        Fill(samples=each, ranks=1, micro_batches=size / each, share=tokens / count, packed=False)
        for each, count in positions.items()
    )


def _row_positions(lengths: torch.Tensor) -> int:
    """Positions of micro-batches whose rows are as wide as their longest sample; lengths: [micro-batches, samples]."""
    return lengths.shape[1] * sum(map(padded, lengths.amax(dim=1).tolist()))


def _first(stream: SampleStream, spec: RunSpec, most: int) -> torch.Tensor:
    """The samples of a run's first steps, in order: of as many whole steps as have `most` samples, at least one."""
    size = spec.batch
    steps = spec.steps or math.ceil((spec.epochs or 1.0) * stream.epoch / size)
    count = size * max(1, min(steps, most // size))
    return torch.tensor(stream.take(0, count))


def _of(lengths: torch.Tensor, learned: torch.Tensor) -> Fullest:
    """The fullest micro-batches; both inputs are [micro-batches of a rank, ranks, samples], ranks taking turns."""
    samples = lengths.shape[2]
    return Fullest(
        samples=samples,
        positions=tuple(samples * padded(longest) for longest in lengths.amax(dim=(0, 2)).tolist()),
        learned=tuple(learned.sum(dim=2).amax(dim=0).tolist()),
    )


def _divisors(number: int) -> Iterator[int]:
    return (size for size in range(1, number + 1) if number % size == 0)
