"""Lets frozen LLM.int8 layers forget their inputs: only a weight gradient would need them, and none is wanted."""

from functools import partial
from typing import Any

import torch


class _FrozenInt8(torch.autograd.Function):
    """bitsandbytes' int8 product, differentiable in the input alone; keeps nothing but the layer.

    bitsandbytes 0.50 ties every input to the autograd node as an attribute, out of sight of gradient checkpointing:
    7B at 16x512 took 22.6 GiB where 4 bits take 8.2. The gradient is the one that bitsandbytes computes.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, inputs.dtype
        return type(layer).forward(layer, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        state = ctx.layer.state
        weight = state.CB.to(ctx.dtype, copy=True).mul_(state.SCB.unsqueeze(1).mul(1.0 / 127.0))
        return torch.matmul(gradients[0].to(ctx.dtype), weight), None


def forget_inputs(model: Any) -> None:
    """Give every int8 layer of a frozen model the product above."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.forward = partial(_product, module)


def _product(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = _FrozenInt8.apply(inputs, layer)
    return product
