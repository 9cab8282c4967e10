"""The end of an optimizer step: gradients are unscaled and clipped, and applied unless they are not finite."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from qdist.runtime.engine.adamw import set_rate

Across = Callable[[torch.Tensor], torch.Tensor]
"""Sums a scalar over the ranks that hold the other parts of the adapter."""


class StepResult(NamedTuple):
    """Result of an optimizer step. `skipped` if the gradients were not finite; the norm is before clipping."""

    gradient_norm: float
    skipped: bool


def finish_gradients(
    parameters: list[nn.Parameter], *, clip: float, loss_scale: float, across: Across | None = None
) -> StepResult:
    """Unscale and clip gradients in place; skip if not finite, here or on a rank that `across` sums over."""
    gradients = _gradients_of(parameters)
    norm = float(_norm_of(gradients, across)) / loss_scale
    if not math.isfinite(norm):
        return StepResult(norm, True)
    factor = (1.0 / loss_scale) * (min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0)
    if factor != 1.0:
        for device in {gradient.device for gradient in gradients}:
            torch._foreach_mul_([gradient for gradient in gradients if gradient.device == device], factor)
    return StepResult(norm, False)


def _gradients_of(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _norm_of(gradients: list[torch.Tensor], across: Across | None) -> torch.Tensor:
    """Norm of all gradients together, as a scalar on their device."""
    here = torch.nn.utils.get_total_norm(gradients)
    return here if across is None else across(here.double().square()).sqrt()


class DeviceUpdate:
    """The same on one device without waiting for it: norm, clipping, skipping and AdamW are launched, then read.

    For torch's fused AdamW, which unscales gradients and skips a step by two scalars on the device. `launch` is device
    work alone: a CUDA graph may hold it once AdamW has its moments, if the gradients stay where they are.

    flat: the buffer in which all gradients are, if they are in one.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        optimizer: Any,
        *,
        clip: float,
        across: Across | None = None,
        flat: torch.Tensor | None = None,
    ) -> None:
        device = parameters[0].device
        self.parameters, self.optimizer, self.clip, self.across, self.flat = parameters, optimizer, clip, across, flat
        self._loss_scale = torch.ones((), dtype=torch.float64, device=device)
        self._norm = torch.zeros((), dtype=torch.float64, device=device)
        optimizer.grad_scale = torch.ones((), dtype=torch.float32, device=device)
        optimizer.found_inf = torch.zeros((), dtype=torch.float32, device=device)

    def prepare(self, learning_rate: float, loss_scale: float) -> None:
        """Write a step's numbers to the device. Not a part of a captured graph, which reads them."""
        set_rate(self.optimizer, learning_rate)
        self._loss_scale.fill_(loss_scale)

    def launch(self) -> None:
        """Clip and apply the gradients, which are unscaled in place; a step that is skipped changes nothing."""
        gradients = [self.flat] if self.flat is not None else _gradients_of(self.parameters)
        self._norm.copy_(_norm_of(gradients, self.across) / self._loss_scale)
        too_large = ((self._norm + 1e-6) / self.clip).clamp(min=1.0) if self.clip > 0 else 1.0
        self.optimizer.grad_scale.copy_(self._loss_scale * too_large)
        self.optimizer.found_inf.copy_(self._norm.isfinite().logical_not())
        self.optimizer.step()

    def read(self) -> StepResult:
        """The result of what was launched last. Waits for it."""
        norm = float(self._norm)
        return StepResult(norm, not math.isfinite(norm))
