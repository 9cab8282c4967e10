"""The model's loss on a micro-batch, under the arithmetic that was planned."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from qdist.runtime.loss import summed_loss
from qdist.runtime.samples import Samples


class Forward:
    """Losses of a PEFT model. The adapter is float32; autocast brings it to the backbone's precision."""

    def __init__(self, model: Any, samples: Samples, *, dtype: torch.dtype, fused: bool) -> None:
        self.model, self.samples, self.dtype, self.fused = model, samples, dtype, fused
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy summed over the learned tokens of a micro-batch."""
        with self._autocast():
            return summed_loss(self._base, batch, fused=self.fused)

    @torch.no_grad()
    def evaluate(self, batches: list[list[int]]) -> tuple[float, int]:
        """(summed loss, learned tokens) over micro-batches of sample indices, without dropout."""
        training = self.model.training
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self._base.device)
        tokens = 0
        for indices in batches:
            total += self.loss(self.samples.batch(indices))
            tokens += self.samples.learned(indices)
        self.model.train(training)
        return float(total), tokens

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._base.device.type, dtype=self.dtype)
