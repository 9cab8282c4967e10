"""Scores items on all ranks of a run, whatever their placement."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from qdist.core.errors import JobError
from qdist.core.evaluation.scoring import CameTo, Item, Scored
from qdist.core.planning.plan import Plan
from qdist.runtime.engine.objective import ScoreBatches
from qdist.runtime.engine.torch import Comm
from qdist.runtime.placements.base import Placement

CPU_POSITIONS, GPU_POSITIONS = 2048, 16384
"""Positions of a batch, padding included: a choice that was not measured."""


def batches_of(items: Sequence[Item], positions: int) -> list[list[int]]:
    """Indices of items in batches, the longest first: items of like length together, so that little is padding.

    positions: of a batch at most, padding included, unless a single item has more. Batches depend on the items alone,
    never on the ranks, and so the answers do not either.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(items)), key=lambda index: -len(items[index].tokens)):
        if batches and (len(batches[-1]) + 1) * len(items[batches[-1][0]].tokens) <= positions:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def collate_items(items: Sequence[Item], *, pad_id: int) -> dict[str, torch.Tensor]:
    """A batch with a row an item, padded on the right: input_ids [items, width]; picked and targets [answers]."""
    width = max(len(item.tokens) for item in items)
    inputs = torch.full((len(items), width), pad_id, dtype=torch.int64)
    for row, item in enumerate(items):
        inputs[row, : len(item.tokens)] = torch.tensor(item.tokens, dtype=torch.int64)
    picked = [row * width + position for row, item in enumerate(items) for position in item.positions]
    targets = [target for item in items for target in item.targets]
    return {"input_ids": inputs, "picked": torch.tensor(picked, dtype=torch.int64), "targets": torch.tensor(targets)}


def positions_of(plan: Plan) -> int:
    """Positions of a batch in an evaluation: the usual, or fewer where the plan found room for less on the GPUs."""
    if plan.device == "cpu":
        return CPU_POSITIONS
    return min(GPU_POSITIONS, plan.micro_batch * plan.seq_len)


def _require_numbers(scored: Sequence[Scored]) -> None:
    """Raise JobError if a model's answers are not finite, of which any figure would mislead."""
    bad = sum(not all(map(math.isfinite, own.logprobs)) for own in scored)
    if bad:
        raise JobError(
            f"the model's answers to {bad:,} of {len(scored):,} items are NaN or infinite",
            try_="--set dtype=float32",
        )


class PlacedScorer:
    """The `Scorer` of a rank: all ranks of the run score the same items together."""

    def __init__(
        self, score: ScoreBatches, place: Placement, comm: Comm, *, longest: int, pad_id: int, positions: int = 0
    ) -> None:
        """score: of `Built`, or of the placement's `scoring`. positions: see `batches_of`; 0 for the device's usual."""
        self._score, self._place, self._comm, self._pad_id = score, place, comm, pad_id
        self.longest = longest
        self._positions = positions or (CPU_POSITIONS if place.plan.device == "cpu" else GPU_POSITIONS)

    def score(self, items: Sequence[Item], came_to: CameTo) -> list[Scored]:
        """The answers to all items, in their order, on every rank. Collective.

        Raises JobError, on every rank, where answers are NaN or infinite.
        """
        batches = batches_of(items, self._positions)
        ranks = self._place.plan.data_parallel
        own = range(self._place.data_rank, len(batches), ranks)
        passes = [*own]
        if self._place.in_step and len(own) < -(-len(batches) // ranks):
            passes.append(0)  # weights are gathered only by all together: others have one more
        done = 0

        def count(number: int) -> None:
            nonlocal done
            came_to(min(len(items), done * ranks))
            done += len(batches[passes[number - 1]])

        made = (collate_items([items[index] for index in batches[number]], pad_id=self._pad_id) for number in passes)
        answers = self._score(made, count)
        # As arrays: as lists of numbers, two million took as long to exchange as half of the passes.
        mine = {number: answer.cpu().numpy() for number, answer in zip(own, answers, strict=False)}
        scored: dict[int, Scored] = {}
        for found in self._comm.gather(mine):
            scored.update(answers_by_item(found, batches, items))
        came_to(len(items))
        ordered = [scored[index] for index in range(len(items))]
        _require_numbers(ordered)
        return ordered


def answers_by_item(
    found: Mapping[int, np.ndarray], batches: Sequence[Sequence[int]], items: Sequence[Item]
) -> Iterator[tuple[int, Scored]]:
    """The answers of batches by number, float32 [answers, 2], as those of items by index."""
    for number, answers in found.items():
        logprobs, greedy = answers[:, 0].tolist(), (answers[:, 1] > 0).tolist()
        stop = 0
        for index in batches[number]:
            start, stop = stop, stop + len(items[index].positions)
            yield index, Scored(tuple(logprobs[start:stop]), tuple(greedy[start:stop]))
