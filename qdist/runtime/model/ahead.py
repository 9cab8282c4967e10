"""Unpacks the weights of the next product beside the product at hand, into one of two buffers that all layers share.

Unpacking moves bytes and products compute, so that side by side they take little longer than the products alone; of
small micro-batches, which leave much of a GPU idle, unpacking is up to a quarter of a pass. Worth it only inside CUDA
graphs: launched by Python, two streams cost more than they save. Issue 18.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

_ATTRIBUTE = "unpacks_ahead"


class Unpackable(Protocol):
    """A packed linear."""

    in_features: int
    out_features: int

    def unpack_into(self, out: torch.Tensor) -> None:
        """Write the unpacked weights to out, [out_features, in_features]."""


class Lane(Protocol):
    """A second stream of work."""

    def start(self, work: Callable[[], None]) -> None:
        """Do work beside what follows, once all that came before is done."""

    def wait(self) -> None:
        """Have what follows wait for the work that was started."""


class StreamLane:
    """A stream of a GPU; may be used inside a capture."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def start(self, work: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class UnpackAhead:
    """Hands out unpacked weights in the order of the passes, which the first micro-batch shows.

    largest: weights of the largest matrix. Two of them are held.
    """

    def __init__(self, lane: Lane, *, largest: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self._lane = dtype, lane
        self._buffers = torch.empty((2, largest), dtype=dtype, device=device)
        self._order: list[Unpackable] = []
        self._taken: list[Unpackable] = []
        self._ready: Unpackable | None = None

    def begin(self) -> None:
        """Begin a micro-batch's passes."""
        self._taken = []

    def end(self) -> None:
        """End them: what was unpacked for nobody is waited for."""
        self._settle()
        self._order = self._taken

    def take(self, layer: Unpackable) -> torch.Tensor:
        """The unpacked weights of a layer, until the next but one are taken; the next ones begin to be unpacked."""
        at = len(self._taken)
        self._taken.append(layer)
        own = self._place(at, layer)
        is_ready = self._ready is layer
        self._settle()
        if not is_ready:
            layer.unpack_into(own)
        if self._order[at : at + 1] == [layer] and at + 1 < len(self._order):
            self._ready = following = self._order[at + 1]
            place = self._place(at + 1, following)
            self._lane.start(lambda: following.unpack_into(place))
        return own

    def _settle(self) -> None:
        if self._ready is not None:
            self._lane.wait()
            self._ready = None

    def _place(self, at: int, layer: Unpackable) -> torch.Tensor:
        shape = (layer.out_features, layer.in_features)
        return self._buffers[at % 2][: shape[0] * shape[1]].view(shape)


def unpack_ahead(model: Any, device: torch.device, dtype: torch.dtype, lane: Lane | None = None) -> None:
    """Have the packed linears of a model that can be unpacked into a buffer share an `UnpackAhead`."""
    layers = [module for module in model.modules() if getattr(module, "may_unpack_ahead", False)]
    if not layers:
        return
    largest = max(layer.in_features * layer.out_features for layer in layers)
    ahead = UnpackAhead(lane or StreamLane(device), largest=largest, dtype=dtype, device=device)
    for layer in layers:
        layer.ahead = ahead
    setattr(model, _ATTRIBUTE, ahead)


def unpack_ahead_of(model: Any) -> UnpackAhead | None:
    """What `unpack_ahead` gave a model."""
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, UnpackAhead) else None
