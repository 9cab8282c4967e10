"""When does a sharded backbone gather which bytes? One unit ahead of its use, in an order that the passes alone decide.

Two buffers take turns for the decoder layers, so that one is read while the next layer arrives in the other; a third is
for embedding and head. Nothing is copied in or out: the ranks' parts lie in the buffer one after the other. A pass does
not allocate for this nor have the CPU wait, so a CUDA graph can have the gathers in it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from qdist.core.errors import JobError
from qdist.runtime.formats.checksum import slice_sums
from qdist.runtime.model.sliced import Peers, Sliced, Unit


class Buffer:
    """Memory that units take turns in."""

    def __init__(self, units: Sequence[Unit], device: torch.device) -> None:
        self.content = torch.zeros(max(unit.bytes for unit in units), dtype=torch.uint8, device=device)
        self.holds: Unit | None = None
        """The unit whose bytes are here or on their way."""
        self.arrived = torch.cuda.Event() if device.type == "cuda" else None
        for unit in units:
            unit.lay_into(self.content[: unit.bytes])


class Gathers:
    """Gathers units for the passes of a model, on a stream of its own.

    layers: in the order of a forward pass. tables: embedding and head, or none where they are whole on every rank.
    """

    def __init__(self, layers: Sequence[Unit], tables: Sequence[Unit], *, peers: Peers, device: torch.device) -> None:
        self.layers, self.tables = tuple(layers), tuple(tables)
        self._peers, self._device = peers, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffer_of: dict[Unit, Buffer] = {}
        for units in filter(None, (self.layers[::2], self.layers[1::2], self.tables)):
            buffer = Buffer(units, device)
            self._buffer_of |= dict.fromkeys(units, buffer)
        self._in_backward = False
        self._have_gradients: set[int] = set()

    def watch(self, decoder: nn.Module, layers: Sequence[nn.Module], embedding: nn.Module) -> None:
        """Gather whenever a pass comes to one of these modules: `layers` are those of the units."""
        decoder.register_forward_pre_hook(lambda *_: self.begin())
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(_without_result, self.enter, index))
            layer.register_forward_hook(partial(self._leave, index))
        if self.tables:
            embedding.register_forward_pre_hook(partial(_without_result, self.need, self.tables[0]))
            decoder.register_forward_hook(partial(_without_result, self.need, self.tables[-1]))

    def begin(self) -> None:
        """Begin a forward pass. What is in the buffers is not counted on: a replayed graph leaves no word of it."""
        self.forget()
        self._in_backward = False
        self._have_gradients.clear()
        for unit in (*self.tables[:1], self.layers[0]):
            self.start(unit)

    def enter(self, index: int) -> None:
        """Come to a layer in the forward pass. One that is recomputed is there already, for its backward pass."""
        if self._in_backward:
            return
        self.need(self.layers[index])
        for unit in (*self.layers[index + 1 :], *self.tables[-1:])[:1]:
            self.start(unit)

    def enter_backward(self, index: int) -> None:
        """Come to a layer in the backward pass, or to its recomputation."""
        self._in_backward = True
        self.need(self.layers[index])
        if index - 1 in self._have_gradients:
            self.start(self.layers[index - 1])

    def need(self, unit: Unit) -> None:
        """Have the stream that computes wait for a unit's bytes."""
        self.start(unit)
        arrived = self._buffer_of[unit].arrived
        if arrived is not None and unit.slots:
            torch.cuda.current_stream(self._device).wait_event(arrived)

    def start(self, unit: Unit) -> None:
        """Gather a unit, unless it is there or empty, once what was launched so far is done with its buffer."""
        buffer = self._buffer_of[unit]
        if buffer.holds is unit or not unit.slots:
            return
        buffer.holds = unit
        whole = buffer.content[: unit.bytes]
        if self._stream is None or buffer.arrived is None:
            self._peers.gather(whole, unit.part)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._peers.gather(whole, unit.part)
            buffer.arrived.record()

    def forget(self) -> None:
        """Gather anew whatever is needed next."""
        for buffer in self._buffer_of.values():
            buffer.holds = None

    def check(self) -> int:
        """Gather every unit once and compare its bytes with what the ranks keep; returns the bytes compared.

        Raises JobError naming the tensor. Collective.
        """
        self.forget()
        return sum(self._check(unit) for unit in (*self.tables, *self.layers) if unit.slots)

    def _check(self, unit: Unit) -> int:
        self.need(unit)
        by_start = {slot.start: slot for slot in unit.slots}.values()
        kept = torch.stack([slice_sums(slot.parameter.kept, slot.parameter.first_byte) for slot in by_start])
        self._peers.add_up(kept)
        gathered = torch.stack([slice_sums(_bytes_of(slot.parameter), 0) for slot in by_start])
        for slot, same in zip(by_start, (kept == gathered).all(1).tolist(), strict=True):
            if not same:
                raise JobError(
                    f"{slot.path}: the bytes gathered from the ranks are not the bytes that they hold",
                    try_="--placement replicate or split, and report this with the output of qdist doctor",
                )
        return sum(slot.parameter.nbytes for slot in by_start)

    def _leave(self, index: int, _: nn.Module, __: Any, output: Any) -> None:
        """Note the backward pass's way into a layer: the gradient of what it returns.

        Before that, nothing of the layer is read, nor is it recomputed. What is below the first adapter has none.
        """
        if self._in_backward:
            return
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                self._have_gradients.add(index)
                tensor.register_hook(partial(_without_result, self.enter_backward, index))


def _without_result(call: Any, argument: Any, *_: Any) -> None:
    """A hook that calls with what it was made for: what hooks return replaces what they were given."""
    call(argument)


def _bytes_of(parameter: Sliced) -> torch.Tensor:
    return parameter.detach().view(-1).view(torch.uint8)


def slice_units(model: nn.Module, paths: Sequence[str], *, peers: Peers, device: torch.device) -> Iterator[Unit]:
    """A unit for the module at each path of a model on the meta device.

    Parameters that are in a module beside it too, as of a block that stands at several depths, stay whole.
    """
    owners: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, set()).add(next((path for path in paths if name.startswith(f"{path}.")), ""))
    for path in paths:
        own = [parameter for parameter, found in owners.items() if found == {path}]
        yield Unit(path, model.get_submodule(path), own, peers=peers, device=device)
