"""One process over several GPUs: decoder layers where the layer map says, hidden states following them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qdist.runtime.model.skeleton import decoder_layers
from qdist.runtime.placements.split.stages import modules_of


def spread(model: Any, layer_devices: Sequence[torch.device]) -> None:
    """Say on which device each part of a causal language model lies, and have every part fetch what it is given.

    The parts get their weights there afterwards (`fill`), and adapters follow them.
    layer_devices: of each decoder layer. What comes before the layers goes to the first device, final norm and head
    to the last; a head that is tied to the embedding stays with it.
    """
    decoder, layers = model.get_decoder(), decoder_layers(model)
    first, last = layer_devices[0], layer_devices[-1]
    norm = model.get_submodule(modules_of(model).final_norm)
    for child in decoder.children():
        if child is not layers:
            _put(child, last if child is norm else first)
    for layer, device in zip(layers, layer_devices, strict=True):
        _put(layer, device)
    head = model.get_output_embeddings()
    _put(head, first if head.weight is model.get_input_embeddings().weight else last)


def _put(part: nn.Module, device: torch.device) -> None:
    for module in part.modules():
        module.runs_on = device
    fetch_to(part, device)


def fetch_to(part: nn.Module, device: torch.device) -> None:
    """Before each pass of a part, move the tensors that it is given: hidden states, masks, positions."""
    from accelerate.utils import send_to_device

    def fetch(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches its kernels there, wherever their arguments are
        return send_to_device((inputs, named), device, non_blocking=True)

    part.register_forward_pre_hook(fetch, with_kwargs=True)
