"""The model's loss on a micro-batch, under the arithmetic that was planned."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from qdist.runtime.loss import hidden_states, loss_of, summed_loss
from qdist.runtime.samples import Samples

CameTo = Callable[[int], None]
"""Told the number of each micro-batch, from 1, before it is computed."""
Evaluate = Callable[[list[list[int]], CameTo], tuple[float, int]]
"""A rank's (summed loss, learned tokens) over micro-batches of sample indices."""


def unseen(count: int) -> None:
    """For an evaluation that nobody watches."""


class Forward:
    """Losses of a PEFT model. The adapter is float32; autocast brings it to the backbone's precision."""

    def __init__(self, model: Any, samples: Samples, *, dtype: torch.dtype, fused: bool) -> None:
        self.model, self.samples, self.dtype, self.fused = model, samples, dtype, fused
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy summed over the learned tokens of a micro-batch."""
        with self._autocast():
            return summed_loss(self._base, batch, fused=self.fused)

    def part(self, inputs: torch.Tensor) -> torch.Tensor:
        """The decoder layers that are here: token ids, or the hidden states of the stage before, to hidden states."""
        with self._autocast():
            return hidden_states(self._base, inputs)

    def loss_of(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The last stage's end: the summed loss of what `part` gave."""
        with self._autocast():
            return loss_of(self._base, hidden, labels, fused=self.fused)

    @torch.no_grad()
    def evaluate(self, batches: list[list[int]], came_to: CameTo = unseen) -> tuple[float, int]:
        """(summed loss, learned tokens) over micro-batches of sample indices, without dropout."""
        losses = []
        with self.without_dropout():
            for count, indices in enumerate(batches, 1):
                came_to(count)
                losses.append(self.loss(self.samples.batch(indices)).double())
        return float(sum(losses)), sum(map(self.samples.learned, batches))

    @contextlib.contextmanager
    def without_dropout(self) -> Iterator[None]:
        """The model as it judges; then as it was."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._base.device.type, dtype=self.dtype)
