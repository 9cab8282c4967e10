"""Places a model in use as `qdist.core.planning.inference` decides: on one or several GPUs, partly in host memory."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdist.core.errors import SpecError
from qdist.core.planning.inference import Footprint, Residence, reside, room
from qdist.host.machine import nvml, probe
from qdist.runtime.adapters.attach import settle_offloaded
from qdist.runtime.model.packed import is_offloaded
from qdist.runtime.model.skeleton import offload
from qdist.runtime.placements.split.stages import fetch_to, spread


def choose(parts: Footprint, *, device: str | None, max_memory_bytes: int | None, in_host: bool = False) -> Residence:
    """Where to place a model on this machine, as it is now.

    device: where all of it goes, whatever is free there. max_memory_bytes: of each GPU. in_host: it is there already.
    Raises SpecError if the two contradict each other or the machine, PlanError where the model does not fit.
    """
    if device is None and torch.cuda.is_available():
        host_bytes = None if in_host else probe.host_memory(Path("/"))[1]
        return reside(parts, [room(free, max_memory_bytes) for free in free_bytes()], host_bytes=host_bytes)
    if max_memory_bytes is not None:
        raise SpecError(f"max_memory is of GPUs to choose from; here is {device or 'none'}", try_="without max_memory")
    return on_device(torch.device(device or "cpu"), layers=len(parts.layers))


def on_device(device: torch.device, *, layers: int) -> Residence:
    """Everything on one device."""
    return Residence(layer_gpu=(device.index or 0,) * layers if device.type == "cuda" else ())


def free_bytes() -> tuple[int, ...]:
    """Free bytes of each GPU in torch's order, from the driver: asking CUDA would open a context on every card."""
    driver = nvml.read()
    free = {card.uuid.removeprefix("GPU-"): card.free_bytes for card in driver.cards} if driver else {}
    found = []
    for index in range(torch.cuda.device_count()):
        known = free.get(str(torch.cuda.get_device_properties(index).uuid))
        cached = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        found.append((torch.cuda.mem_get_info(index)[0] if known is None else known) + cached)
    return tuple(found)


def device_of(gpu: int) -> torch.device:
    """The device of a GPU number."""
    return torch.device("cuda", gpu)


def first_device(residence: Residence) -> torch.device:
    """The device that takes token ids."""
    return device_of(residence.layer_gpu[0]) if residence.layer_gpu else torch.device("cpu")


def arrange(model: Any, residence: Residence) -> None:
    """Assign a device to each part of a model, before or after it has bytes."""
    if len(residence.gpus) > 1:
        spread(model, [device_of(gpu) for gpu in residence.layer_gpu])
    offload(model, residence.offloaded)


def settle(model: Any, residence: Residence) -> None:
    """Finish a model that was arranged and filled, after its adapter was attached.

    Tables that were resized, and the modules that PEFT puts around them, fetch what they are given as the parts did
    that `arrange` saw. The adapter of offloaded layers comes to the GPU (PEFT 0.21 puts it where the
    weights are), and linears that nobody packed multiply there.
    """
    settle_offloaded(model)
    if first_device(residence).type == "cuda":
        _current_while_used(getattr(model, "get_base_model", lambda: model)(), first_device(residence))
    if len(residence.gpus) < 2:
        return
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        fetch_to(table, next(table.parameters()).device)


def _current_while_used(model: nn.Module, device: torch.device) -> None:
    """Make the model's GPU current while it computes, then restore the previous one: Triton launches on it."""
    before: list[int] = []

    def enter(*_: Any) -> None:
        before.append(torch.cuda.current_device())
        torch.cuda.set_device(device)

    def leave(*_: Any) -> None:
        torch.cuda.set_device(before.pop())

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)


def move(model: Any, residence: Residence) -> Any:
    """Move a whole unpacked model from host memory to its placement."""
    arrange(model, residence)
    moved: dict[nn.Parameter, nn.Parameter] = {}  # a tied head's table moves once
    for module in model.modules():
        place = getattr(module, "runs_on", first_device(residence))
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name.endswith("bias") or not is_offloaded(module):
                if parameter not in moved:
                    moved[parameter] = nn.Parameter(parameter.detach().to(place), requires_grad=False)
                module.register_parameter(name, moved[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(place))
    settle(model, residence)
    return model
