"""Forward and backward of a micro-batch as one CUDA graph, captured once a shape and replayed.

Python launches some 160 kernels a layer and pass; a small micro-batch leaves the GPU waiting for them. A graph launches
them all at once. Gradients are added up in place, so they must be there before the capture and stay where they are.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Batch = Mapping[str, torch.Tensor]
Passes = Callable[[Batch], torch.Tensor]
"""Forward and backward of a micro-batch; returns its summed loss, detached, a scalar on the device."""
Key = tuple[tuple[str, tuple[int, ...]], ...]


class _Captured(NamedTuple):
    graph: Any
    inputs: dict[str, torch.Tensor]
    loss: torch.Tensor


class Graphs:
    """Runs the passes of micro-batches, as graphs where they can be.

    A shape is seen once without a graph: whatever kernels compile or allocate the first time, they do then. All graphs
    share one pool of memory, as no two run at a time and nothing in it outlives a replay but the loss.

    passes: reads only tensors on the device that are the same objects every time, beside its argument.
    """

    def __init__(self, passes: Passes, device: torch.device, *, most: int = 24) -> None:
        self._passes, self._device, self._most = passes, device, most
        self._captured: dict[Key, _Captured] = {}
        self._seen: set[Key] = set()
        self._pool: Any = None
        self._stream: Any = None
        self.refused = ""
        """Why passes are no longer captured; empty while they are."""
        self.ready = True
        """Whether to capture yet: not while hooks watch the passes, which a replay would not call."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The summed loss of a micro-batch [], float64; its gradients are added to those that are there."""
        key = tuple((name, tuple(value.shape)) for name, value in sorted(batch.items()))
        captured = self._captured.get(key)
        if captured is None and self.ready and key in self._seen and not self.refused:
            captured = self._capture(key, batch)
        if captured is None:
            self._seen.add(key)
            return self._passes(self._moved(batch)).double()
        for name, place in captured.inputs.items():
            place.copy_(_pinned(batch[name]), non_blocking=True)
        captured.graph.replay()
        return captured.loss.double()

    def _moved(self, batch: Batch) -> Batch:
        return {name: _pinned(value).to(self._device, non_blocking=True) for name, value in batch.items()}

    def _capture(self, key: Key, batch: Batch) -> _Captured | None:
        """Capture a shape's passes; None, with the reason kept, where that cannot be done."""
        if len(self._captured) >= self._most:
            self.refused = f"more than {self._most} shapes of micro-batches"
            return None
        inputs = {name: value.clone() for name, value in self._moved(batch).items()}
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # what passes without a graph have left is not in the graphs' pool
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            loss = self._passes(inputs)
        self._captured[key] = _Captured(graph, inputs, loss)
        return self._captured[key]


def _pinned(values: torch.Tensor) -> torch.Tensor:
    """Pageable memory would have the copy wait for the GPU."""
    return values if values.is_cuda or values.is_pinned() else values.pin_memory()
