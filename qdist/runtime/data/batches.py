"""The micro-batches of each step and of evaluation, as tensors of few shapes."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn import functional

from qdist.core.planning.plan import Plan
from qdist.runtime.data.bins import BinSize, bin_size, cut, deal, pack
from qdist.runtime.data.sizes import few_sizes, padded, size_for
from qdist.runtime.data.stream import SampleStream, divide, stream_of
from qdist.runtime.data.tokenized import IGNORED, Summary, TokenizedSet, learned_tokens, load

_MOST_MEASURED = 1 << 13
"""Samples, from the start of the run, whose micro-batches a run's sizes are chosen for: they are the sizes of all."""
_PICKED_OF_A_WIDTH = 2
"""Numbers of picked positions for each width of unpacked rows: each is a shape, and captured by itself."""


def width_of(samples: Sequence[int], tokenized: TokenizedSet) -> int:
    """Positions per row of a micro-batch without more padding than there must be."""
    return padded(max(span.stop - span.start for span in map(tokenized.span, samples)))


def collate(
    samples: Sequence[int], tokenized: TokenizedSet, *, pad_id: int, width: int | None = None
) -> dict[str, torch.Tensor]:
    """One micro-batch with a row a sample, padded on the right to `width`, or to the longest sample if that is None.

    Returns input_ids and labels, each int64 [samples, width]. Causal attention makes a mask unnecessary.
    """
    spans = [tokenized.span(index) for index in samples]
    shape = (len(spans), width or width_of(samples, tokenized))
    batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED, dtype=torch.int64),
    }
    for row, span in enumerate(spans):
        length = span.stop - span.start
        batch["input_ids"][row, :length] = tokenized.tokens[span]
        batch["labels"][row, :length] = tokenized.labels[span]
    return batch


def collate_bin(
    samples: Sequence[int], tokenized: TokenizedSet, *, pad_id: int, size: BinSize, longest: int
) -> dict[str, torch.Tensor]:
    """One packed micro-batch: all samples in one row, padded on the right.

    longest: tokens of the longest sample of the run, of which padding has no longer segments either.
    Returns input_ids, labels and positions, int64 [1, size.positions], and ends, int32 [segments + 1], as long for
    every bin of the run: where samples end, from 0, then pieces of padding, then nothing at the end of the row.
    """
    batch = {
        "input_ids": torch.full((1, size.positions), pad_id, dtype=torch.int64),
        "labels": torch.full((1, size.positions), IGNORED, dtype=torch.int64),
    }
    ends = [0]
    for span in map(tokenized.span, samples):
        start, stop = ends[-1], ends[-1] + span.stop - span.start
        batch["input_ids"][0, start:stop] = tokenized.tokens[span]
        batch["labels"][0, start + 1 : stop] = tokenized.labels[
            span.start + 1 : span.stop
        ]  # nothing predicts the first
        ends.append(stop)
    while ends[-1] < size.positions:
        ends.append(min(ends[-1] + longest, size.positions))
    segments = size.samples + -(-size.positions // longest)
    batch["positions"] = torch.cat([torch.arange(stop - start) for start, stop in pairwise(ends)])[None]
    batch["ends"] = torch.tensor(ends + [size.positions] * (segments + 1 - len(ends)), dtype=torch.int32)
    return batch


def pick(labels: torch.Tensor, sizes: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
    """The positions with a loss, and the tokens wanted there, of labels aligned with their tokens [rows, width].

    sizes: ascending; padded with (0, -100) to the smallest that is enough, or to all positions. None for no padding.
    Returns picked, int64 [n] in the flattened micro-batch, and targets, int64 [n].
    """
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    picked, targets = rows * labels.shape[1] + columns, labels[rows, columns + 1]
    if sizes is not None:
        missing = size_for(len(picked), sizes, otherwise=padded(labels.numel())) - len(picked)
        picked = functional.pad(picked, (0, missing))
        targets = functional.pad(targets, (0, missing), value=IGNORED)
    return {"picked": picked, "targets": targets}


class Samples:
    """Micro-batches by step, determined by the plan and the step alone, never by earlier steps."""

    def __init__(self, plan: Plan, tokenized: TokenizedSet, *, pad_id: int) -> None:
        self.plan, self.tokenized, self.pad_id = plan, tokenized, pad_id
        parts, seed = plan.data.parts if plan.data else (), plan.spec.seed
        train, held_out = divide(len(tokenized), parts, held_out=plan.spec.train.held_out, seed=seed)
        self.stream: SampleStream = stream_of(train, parts, seed=seed)
        self.held_out: list[int] = held_out.tolist()
        self.bin_size = bin_size(
            micro_batch=plan.micro_batch,
            seq_len=plan.seq_len,
            mean_length=len(tokenized.tokens) / max(1, len(tokenized)),
        )

    def step(self, step: int) -> list[list[int]]:
        """Sample indices of a step, micro-batch by micro-batch, for all ranks together: rank r has r, r + ranks, ...

        Packed, as many for each rank, of which some may be empty.
        """
        plan, size = self.plan, self.plan.spec.batch
        chosen = self.stream.take(step * size, size)
        if not plan.packed:
            return cut(chosen, plan.micro_batch)
        least = plan.gpus_per_group if plan.schedule == "1f1b" else 1
        bins = deal(self.lengths(chosen), self.bin_size, ranks=plan.data_parallel, least=least)
        return [[chosen[place] for place in own] for own in bins]

    def held_out_batches(self) -> list[list[int]]:
        """The held-out samples in micro-batches, in an order independent of the number of ranks."""
        if not self.plan.packed:
            return cut(self.held_out, self.plan.micro_batch)
        bins = pack(self.lengths(self.held_out), self.bin_size)
        return [[self.held_out[place] for place in own] for own in bins]

    def batch(self, indices: Sequence[int], beside: Sequence[Sequence[int]] = ()) -> dict[str, torch.Tensor]:
        """One micro-batch as padded tensors: input_ids, labels, picked and targets; packed, positions and ends too.

        beside: micro-batches that are to have the same shape, where there are few: that of the largest of them.
        """
        together = (indices, *beside)
        if self.plan.packed:
            batch = collate_bin(
                indices, self.tokenized, pad_id=self.pad_id, size=self.bin_size, longest=self.plan.seq_len
            )
        else:
            batch = collate(indices, self.tokenized, pad_id=self.pad_id, width=self._width(together))
        width = batch["labels"].shape[1]
        return batch | pick(batch["labels"], self._picks(width, together))

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Tokens of each of these samples."""
        return [span.stop - span.start for span in map(self.tokenized.span, indices)]

    def learned(self, indices: Sequence[int]) -> int:
        """Number of tokens of these samples that have a loss."""
        return learned_tokens(self.tokenized, indices)

    def tokens(self, indices: Sequence[int]) -> int:
        """Number of tokens of these samples, without padding."""
        return sum(self.lengths(indices))

    def padding(self, indices: Sequence[int], beside: Sequence[Sequence[int]] = ()) -> int:
        """Padding positions in a micro-batch of these samples. beside: as for `batch`."""
        packed = self.plan.packed
        positions = self.bin_size.positions if packed else len(indices) * self._width((indices, *beside))
        return positions - self.tokens(indices)

    def _width(self, together: Sequence[Sequence[int]]) -> int:
        """Positions per row of the first of unpacked micro-batches; where shapes are few, of all of them."""
        if self._sizes is None:
            return width_of(together[0], self.tokenized)
        tight = max(width_of(own, self.tokenized) for own in together)
        return size_for(tight, tuple(self._sizes), otherwise=padded(self.plan.seq_len))

    def _picks(self, width: int, together: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        """How many positions may be picked in micro-batches of a width, so that each of these has enough."""
        if self._sizes is None:
            return None
        least = max(map(self.learned, together))
        return tuple(size for size in self._sizes.get(width, ()) if size >= least)

    @cached_property
    def _sizes(self) -> Mapping[int, tuple[int, ...]] | None:
        """The widths of a run, ascending, and of each how many positions may be picked; None where any are.

        Padding to few widths costs a run of unpacked rows a quarter of its positions (oasst_600, seq_len 2048), so it
        is for graphs alone. Packed rows have one width, and an empty one must not be empty for a GPU's kernels.
        """
        if self.plan.device == "cpu" or not (self.plan.packed or self.plan.graphs):
            return None
        batches = list(self._measured())
        if self.plan.packed:
            return {self.bin_size.positions: few_sizes(self.learned(own) for own in batches)}
        widths = few_sizes(width_of(own, self.tokenized) for own in batches)
        learned: dict[int, list[int]] = {width: [] for width in widths}
        for own in batches:
            width = size_for(width_of(own, self.tokenized), widths, otherwise=widths[-1])
            learned[width].append(self.learned(own))
        return {width: few_sizes(counts, most=_PICKED_OF_A_WIDTH) for width, counts in learned.items() if counts}

    def _measured(self) -> Iterator[list[int]]:
        """Micro-batches of the first steps, which the sizes of all are chosen for."""
        size = self.plan.spec.batch
        for step in range(max(1, min(self.plan.steps, _MOST_MEASURED // size))):
            yield from self.step(step)


def read_samples(plan: Plan, *, pad_id: int) -> Samples:
    """The plan's data set, memory-mapped from the token cache; random tokens if the run has none."""
    if plan.data is None or not plan.data.path:
        return Samples(plan, _random_tokens(plan), pad_id=pad_id)
    path = Path(plan.data.path)
    return Samples(plan, load(path, key=path.stem), pad_id=pad_id)


def _random_tokens(plan: Plan) -> TokenizedSet:
    """Full-length random samples, enough for 8 different steps, to try a model's shape without data."""
    count, length = 8 * plan.spec.batch, plan.spec.seq_len
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
