"""One process over several GPUs: decoder layers where the layer map says, hidden states following them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from qdist.runtime.methods.skeleton import decoder_layers
from qdist.runtime.placements.stages import FINAL_NORMS


def spread(model: Any, layer_devices: Sequence[torch.device]) -> None:
    """Move a causal language model's parts to devices, and have every part fetch what it is given.

    layer_devices: of each decoder layer. What comes before the layers goes to the first device, final norm and head
    to the last; a head that is tied to the embedding stays with it. Adapters that are put on afterwards follow.
    """
    decoder, layers = model.get_decoder(), decoder_layers(model)
    first, last = layer_devices[0], layer_devices[-1]
    end = [module for name in (*FINAL_NORMS, "project_out") if (module := getattr(decoder, name, None)) is not None]
    end_ids = {id(module) for module in end}
    for child in decoder.children():
        if child is not layers:
            _put(child, last if id(child) in end_ids else first)
    for layer, device in zip(layers, layer_devices, strict=True):
        _put(layer, device)
    head = model.get_output_embeddings()
    _put(head, first if head.weight is model.get_input_embeddings().weight else last)


def _put(module: nn.Module, device: torch.device) -> None:
    """Move a module, and before each of its passes the tensors that it is given: hidden states, masks, positions."""

    def fetch(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), (inputs, named))

    module.to(device)
    module.register_forward_pre_hook(fetch, with_kwargs=True)
