"""How does one process answer scored items, with a model that lies on its devices?"""

from collections.abc import Sequence
from typing import Any

import torch

from qdist.core.errors import SpecError
from qdist.core.evaluation.scoring import CameTo, Item, Scored
from qdist.runtime.engine.objective import Passes
from qdist.runtime.evaluate.scorer import CPU_POSITIONS, GPU_POSITIONS, answers_by_item, batches_of, collate_items


class LocalScorer:
    """Scores items with a whole model in this process: any causal one of transformers, with PEFT around it or not.

    longest: most tokens of an item. positions: see `batches_of`; 0 for the device's usual.
    """

    def __init__(self, model: Any, *, longest: int, positions: int = 0) -> None:
        self._passes = Passes(model, dtype=torch.float32)  # computes as the model is, without autocast
        self._positions = positions or (CPU_POSITIONS if model.device.type == "cpu" else GPU_POSITIONS)
        self.longest = longest

    def score(self, items: Sequence[Item], came_to: CameTo) -> list[Scored]:
        """The answers to all items, in their order. Raises SpecError for an item that is too long."""
        most = max((len(item.tokens) for item in items), default=0)
        if most > self.longest:
            raise SpecError(f"an item has {most:,} tokens, and the model takes {self.longest:,}", try_="shorter items")
        batches = batches_of(items, self._positions)
        sizes = [0, *map(len, batches)]

        def count(number: int) -> None:
            came_to(sum(sizes[:number]))

        made = (collate_items([items[index] for index in own], pad_id=0) for own in batches)
        answers = dict(enumerate(answer.cpu().numpy() for answer in self._passes.score(made, count)))
        scored = dict(answers_by_item(answers, batches, items))
        came_to(len(items))
        return [scored[index] for index in range(len(items))]
