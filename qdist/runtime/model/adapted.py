"""A frozen linear and its LoRA or QA-LoRA matrices as one product: nothing is added or kept twice."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qdist.runtime.kernels.pooling import means
from qdist.runtime.model.packed import PackedLinear, compute_dtype


def adapted_product(
    inputs: torch.Tensor, down: torch.Tensor, up: torch.Tensor, layer: nn.Linear, scaling: float, pool: int = 1
) -> torch.Tensor:
    """inputs [..., in] W' + scaling (inputs A') B', with gradients for the inputs, A and B.

    down: A, float32 [r, in]. up: B, float32 [out, r].
    pool: above 1, A reads the means of so many inputs that follow each other, and has a column for each.
    """
    product: torch.Tensor = _Adapted.apply(inputs, down, up, layer, scaling, pool)
    return product


def add_pooled_gradient(inputs: torch.Tensor, gradient: torch.Tensor, pool: int) -> None:
    """To the gradient of inputs [tokens, in] add that of the sums of their groups, [tokens, in / pool]."""
    inputs.view(*gradient.shape, pool).add_(gradient.unsqueeze(-1))


class _Adapted(torch.autograd.Function):
    """y = x W' + s (x A') B' (Hu et al. 2021), where ' is the transpose; pool(x) for the second x (Xu et al. 2023).

    The low-rank terms are added inside the matrix products (beta = 1), where PEFT multiplies by s and adds over the
    whole output, and autograd adds the two input gradients. A and B are cast anew in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, down: torch.Tensor, up: torch.Tensor, layer: nn.Linear, scaling: float,
        pool: int,
    ) -> torch.Tensor:  # fmt: skip
        dtype = compute_dtype(inputs)
        flat = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
        product = frozen_product(layer, flat)
        read = flat if pool == 1 else means(flat, pool)  # sums would overflow in float16
        narrow = read @ down.to(dtype).t()
        product.addmm_(narrow, up.to(dtype).t(), alpha=scaling)
        ctx.save_for_backward(read, narrow, down, up)
        ctx.layer, ctx.scaling, ctx.pool, ctx.input_dtype = layer, scaling, pool, inputs.dtype
        return product.view(*inputs.shape[:-1], product.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        read, narrow, down, up = ctx.saved_tensors
        outer = gradients[0]
        gradient = outer.reshape(-1, outer.shape[-1]).to(read.dtype)
        narrow_gradient = (gradient @ up.to(read.dtype)).mul_(ctx.scaling)
        inputs = None
        if ctx.needs_input_grad[0]:
            inputs = frozen_input_gradient(ctx.layer, gradient)
            # A as wide as the inputs is small, and adding within the product is a pass over memory less.
            wide = down.to(read.dtype).repeat_interleave(ctx.pool, dim=1) if ctx.pool > 1 else down.to(read.dtype)
            inputs.addmm_(narrow_gradient, wide, alpha=1 / ctx.pool)
            inputs = inputs.view(*outer.shape[:-1], inputs.shape[-1]).to(ctx.input_dtype)
        up_gradient = _product_in(up.dtype, gradient.t(), narrow).mul_(ctx.scaling)
        down_gradient = _product_in(down.dtype, narrow_gradient.t(), read)
        return inputs, down_gradient, up_gradient, None, None, None


def frozen_product(layer: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """inputs [tokens, in] times the weights of a frozen linear, plus its bias."""
    if isinstance(layer, PackedLinear):
        return layer.product(inputs)
    bias = None if layer.bias is None else layer.bias.to(inputs.device, inputs.dtype)
    return functional.linear(inputs, layer.weight.to(inputs.device, inputs.dtype, non_blocking=True), bias)


def frozen_input_gradient(layer: nn.Linear, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of a frozen linear's inputs, [tokens, in]."""
    if isinstance(layer, PackedLinear):
        return layer.input_gradient(gradient)
    return gradient @ layer.weight.to(gradient.device, gradient.dtype, non_blocking=True)


def _product_in(dtype: torch.dtype, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, rounded once to `dtype` where the device can."""
    if left.is_cuda and left.dtype != dtype:
        product: torch.Tensor = torch.mm(left, right, out_dtype=dtype)
        return product
    return (left @ right).to(dtype)
