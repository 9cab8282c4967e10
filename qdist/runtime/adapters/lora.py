"""LoRA in PEFT's terms: its settings, names and update, and W' and B A as one product."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from qdist.core.planning.plan import Plan
from qdist.runtime.kernels.pooling import means
from qdist.runtime.model.packed import compute_dtype, frozen_input_gradient, frozen_product, unlike_a_view

_PREFIX = "base_model.model."
"""PEFT's prefix of a module path."""


class Term(NamedTuple):
    """What one adapter adds to a linear: factor x B A, each column of A shared by `pool` consecutive inputs."""

    down: torch.Tensor
    """A, float32 [r, in / pool]."""
    up: torch.Tensor
    """B, float32 [out, r]."""
    factor: float
    pool: int


class LoraSettings(msgspec.Struct):
    """The fields used from PEFT's adapter_config.json."""

    r: int
    lora_alpha: float
    target_modules: list[str] | str | None = None
    """Leaf names; or a regular expression of whole paths."""
    target_parameters: list[str] | None = None
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False

    @property
    def pool(self) -> int:
        """Consecutive inputs that share a column of A."""
        return 1

    def factor(self, path: str, down: torch.Tensor) -> float:
        """Factor on B A in the linear at a module path."""
        alpha, rank = self.alpha_pattern.get(path.rpartition(".")[2], self.lora_alpha), down.shape[0]
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)  # Kalajdzievski 2023


class Lora:
    """A method in PEFT's terms and its computations: LoRA's, for other methods to override."""

    settings_type = LoraSettings
    """Type of the fields read from its adapter_config.json."""

    def peft_settings(self, plan: Plan) -> dict[str, Any]:
        """The method's settings in PEFT's configuration."""
        lora = plan.spec.lora
        scale = {"lora_alpha": lora.alpha, "use_rslora": lora.variant == "rslora"}
        return {"r": lora.r, "lora_dropout": lora.dropout, **scale}

    def variant(self) -> Any:
        """PEFT's `LoraVariant` for the method; None if PEFT chooses."""
        return None

    def start_bound(self, plan: Plan, columns: int) -> float:
        """The initial A [r, columns] is uniform between this and its negative (He et al. 2015, as nn.Linear)."""
        return math.sqrt(1 / columns)

    def metadata(self, plan: Plan) -> dict[str, str]:
        """The method's metadata in the header of the adapter's file."""
        return {}

    def scaling(self, layer: Any, name: str) -> float:
        """The scaling for `adapted_product` that reproduces a PEFT layer's result for one of its adapters."""
        scaling: float = layer.scaling[name]
        return scaling


def unscaled(rank: int) -> dict[str, Any]:
    """Settings that make PEFT add B A without scaling."""
    return {"r": rank, "lora_alpha": rank, "alpha_pattern": {}, "use_rslora": False}


def tensor_name(path: str, side: str) -> str:
    """PEFT's name for matrix A or B of the linear at a module path."""
    return f"{_PREFIX}{path}.lora_{side}.weight"


def peft_name(name: str) -> str:
    """A parameter's name as PEFT stores it: without the adapter's name."""
    return (
        name.replace(".lora_A.default.", ".lora_A.")
        .replace(".lora_B.default.", ".lora_B.")
        .replace(".token_adapter.trainable_tokens_delta.default", ".token_adapter.trainable_tokens_delta")
    )


def parameter_path(path: str, parameters: Sequence[str], name: str) -> str:
    """PEFT's module path of the adapter of a 3-D parameter of the module at `path`.

    parameters: all of its adapted ones, in the module's order: PEFT wraps the module once for each, the last outermost.
    """
    return ".".join((path, *["base_layer"] * (len(parameters) - 1 - parameters.index(name))))


def adapted_path(name: str) -> str | None:
    """The module path of the linear that an A tensor belongs to; None for other tensors."""
    end = tensor_name("", "A").removeprefix(_PREFIX)
    return name.removeprefix(_PREFIX).removesuffix(end) if name.endswith(end) else None


def adapted_product(
    inputs: torch.Tensor, down: torch.Tensor, up: torch.Tensor, layer: nn.Linear, scaling: float
) -> torch.Tensor:
    """inputs [..., in] W' + scaling (inputs A') B', differentiable in the inputs, A and B.

    down: A, float32 [r, in]. With fewer columns, each reads the mean of as many inputs that follow each other.
    up: B, float32 [out, r].
    """
    product: torch.Tensor = _Adapted.apply(inputs, down, up, layer, scaling)
    return product


class _Adapted(torch.autograd.Function):
    """y = x W' + s (x A') B' (Hu et al. 2021), where ' is the transpose.

    The low-rank terms are added inside the matrix products (beta = 1), where PEFT multiplies by s and adds over the
    whole output, and autograd adds the two input gradients. A and B are cast anew in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, down: torch.Tensor, up: torch.Tensor, layer: nn.Linear, scaling: float
    ) -> torch.Tensor:
        dtype, pool = compute_dtype(inputs), inputs.shape[-1] // down.shape[1]
        flat = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
        product = frozen_product(layer, flat)
        read = flat if pool == 1 else means(flat, pool)  # sums would overflow in float16
        narrow = read @ down.to(dtype).t()
        product.addmm_(narrow, up.to(dtype).t(), alpha=scaling)
        ctx.save_for_backward(read, narrow, down, up)
        ctx.layer, ctx.scaling, ctx.pool, ctx.input_dtype = layer, scaling, pool, inputs.dtype
        return unlike_a_view(product, (*inputs.shape[:-1], product.shape[-1]))

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
        return inputs, down_gradient, up_gradient, None, None


def _product_in(dtype: torch.dtype, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, rounded once to `dtype` if the device supports it."""
    if left.is_cuda and left.dtype != dtype:
        product: torch.Tensor = torch.mm(left, right, out_dtype=dtype)
        return product
    return (left @ right).to(dtype)
