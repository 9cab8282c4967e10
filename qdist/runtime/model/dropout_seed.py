"""From which number are the dropout masks of a micro-batch made, and where is it?"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_ATTRIBUTE = "dropout_seed"


class _Seed:
    """One number, as an int64 tensor [1] on each device that asked for it."""

    def __init__(self, value: int) -> None:
        self.value, self.tensors = value, dict[torch.device, torch.Tensor]()

    def on(self, device: torch.device) -> torch.Tensor:
        if device not in self.tensors:
            self.tensors[device] = torch.full((1,), self.value, dtype=torch.int64, device=device)
        return self.tensors[device]


class DropoutSeed:
    """The seed shared by the adapted linears of a model. Its tensors keep their addresses: CUDA graphs read them."""

    def __init__(self) -> None:
        self._current = _Seed(0)

    def on(self, device: torch.device) -> torch.Tensor:
        """The seed of the micro-batch at hand, int64 [1]."""
        return self._current.on(device)

    def write(self, value: int, *, in_flight: bool = False) -> None:
        """Set the seed of the next micro-batch, below 2**63, without waiting for a GPU.

        in_flight: whether backward passes of earlier micro-batches are still to come; they keep their own tensors.
        """
        if in_flight:
            self._current = _Seed(value)
            return
        self._current.value = value
        for tensor in self._current.tensors.values():
            tensor.fill_(value)

    def contexts(self) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        """`context_fn` of torch's checkpointing: a recomputed layer draws the masks of its first pass."""
        return contextlib.nullcontext(), self._using(self._current)

    @contextlib.contextmanager
    def _using(self, seed: _Seed) -> Iterator[None]:
        now, self._current = self._current, seed
        try:
            yield
        finally:
            self._current = now


def dropout_seed_of(model: Any) -> DropoutSeed:
    """The seed that a model's adapted linears read; one that nothing reads if it has none."""
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, DropoutSeed) else DropoutSeed()


def give_dropout_seed(model: Any) -> DropoutSeed:
    """A new seed, found again by `dropout_seed_of`."""
    seed = DropoutSeed()
    setattr(model, _ATTRIBUTE, seed)
    return seed
