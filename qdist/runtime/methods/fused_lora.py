"""A LoRA layer and its frozen linear as one product: no addition or scaling of its own, nothing kept twice."""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn import functional

from qdist.runtime.methods.packed import PackedLinear, compute_dtype, is_offloaded


class FusedLora(LoraLinear):
    """PEFT's LoRA layer, whose training pass is `adapted_product`; whatever else PEFT can do is left to PEFT."""

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Make an adapter's matrices, for all of the base layer: PEFT 0.21 would measure this rank's shard of it."""
        base = self.get_base_layer()
        self.in_features, self.out_features = base.in_features, base.out_features
        super().update_layer(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A or args or kwargs:
            return super().forward(x, *args, **kwargs)
        name = active[0]
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return super().forward(x)
        product: torch.Tensor = _Adapted.apply(
            x, self.lora_A[name].weight, self.lora_B[name].weight, self.get_base_layer(), self.scaling[name]
        )
        return product


def settle_offloaded(model: nn.Module) -> None:
    """Of layers whose weights wait in host memory, bring the adapter to the GPU, and have plain linears compute there.

    To be called once the adapter is on: PEFT 0.21 puts its matrices where the weights are.
    """
    for module in model.modules():
        if hasattr(module, "lora_A") and is_offloaded(module.base_layer):
            for matrices in (module.lora_A, module.lora_B):
                matrices.to(module.base_layer.runs_on)
        if is_offloaded(module) and not isinstance(module, PackedLinear):
            module.forward = partial(frozen_product, module)


class _Adapted(torch.autograd.Function):
    """y = x W' + s (x A') B' (Hu et al. 2021), where ' is the transpose.

    The low-rank terms are added inside the matrix products (beta = 1), where PEFT multiplies by s and adds over the
    whole output, and autograd adds the two input gradients. A and B are cast anew in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, down: torch.Tensor, up: torch.Tensor, layer: nn.Linear, scaling: float
    ) -> torch.Tensor:
        dtype = compute_dtype(inputs)
        flat = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
        product = frozen_product(layer, flat)
        narrow = flat @ down.to(dtype).t()
        product.addmm_(narrow, up.to(dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, narrow, down, up)
        ctx.layer, ctx.scaling, ctx.input_dtype = layer, scaling, inputs.dtype
        return product.view(*inputs.shape[:-1], product.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, narrow, down, up = ctx.saved_tensors
        outer = gradients[0]
        gradient = outer.reshape(-1, outer.shape[-1]).to(flat.dtype)
        narrow_gradient = (gradient @ up.to(flat.dtype)).mul_(ctx.scaling)
        inputs = None
        if ctx.needs_input_grad[0]:
            inputs = frozen_input_gradient(ctx.layer, gradient)
            inputs.addmm_(narrow_gradient, down.to(flat.dtype))
            inputs = inputs.view(*outer.shape[:-1], inputs.shape[-1]).to(ctx.input_dtype)
        up_gradient = _product_in(up.dtype, gradient.t(), narrow).mul_(ctx.scaling)
        down_gradient = _product_in(down.dtype, narrow_gradient.t(), flat)
        return inputs, down_gradient, up_gradient, None, None


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
