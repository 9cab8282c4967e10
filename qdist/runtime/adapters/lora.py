"""LoRA in PEFT's terms: its settings, names and update, and W' and B A as one product."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from qdist.core.planning.plan import Plan
from qdist.runtime.kernels.dropout import Mask, add_dropped, dropped, dropped_gradient, dropped_product
from qdist.runtime.kernels.pooling import means
from qdist.runtime.model.packed import (
    add_frozen_input_gradient,
    compute_dtype,
    frozen_input_gradient,
    frozen_product,
    quantize_for,
    unlike_a_view,
)

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


class Reader(NamedTuple):
    """A frozen linear that reads a tensor, and the factor on its B A."""

    layer: nn.Linear
    scaling: float


def adapted_product(
    inputs: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    layer: nn.Linear,
    scaling: float,
    mask: Mask | None = None,
) -> torch.Tensor:
    """inputs [..., in] W' + scaling (inputs A') B', differentiable in the inputs, A and B.

    down: A, float32 [r, in]. With fewer columns, each reads the mean of as many inputs that follow each other.
    up: B, float32 [out, r].
    mask: dropout of what A reads, scaled by 1 / (1 - p).
    """
    return adapted_products(inputs, [down], [up], (Reader(layer, scaling),), mask)[0]


def adapted_products(
    inputs: torch.Tensor,
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    readers: tuple[Reader, ...],
    mask: Mask | None = None,
) -> tuple[torch.Tensor, ...]:
    """`adapted_product` of several linears that read one tensor: they share the mask and the passes over it."""
    products: tuple[torch.Tensor, ...] = _Adapted.apply(inputs, readers, mask, *downs, *ups)
    return products


class _Adapted(torch.autograd.Function):
    """y = x W' + s (x A') B' (Hu et al. 2021) for one or several W, A, B, where ' is the transpose.

    The low-rank terms are added inside the matrix products (beta = 1), where PEFT multiplies by s and adds over the
    whole output, and autograd adds the input gradients. All A are one thin matrix, and all input gradients one sum that
    the products add to. A and B are cast anew in the backward pass, and the mask of dropout is drawn anew.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, readers: tuple[Reader, ...], mask: Mask | None, *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        dtype, downs, ups = compute_dtype(inputs), factors[: len(readers)], factors[len(readers) :]
        ctx.readers, ctx.mask, ctx.input_dtype = readers, mask, inputs.dtype
        ctx.leading = inputs.shape[:-1]
        ctx.set_materialize_grads(False)
        ctx.pool, ctx.ranks = inputs.shape[-1] // downs[0].shape[1], [down.shape[0] for down in downs]
        flat = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
        read, narrow = _narrowed(flat, _stacked(downs, dtype), ctx.pool, mask)
        quantized = quantize_for((reader.layer for reader in readers), flat)
        products = []
        for reader, up, part in zip(readers, ups, narrow.split(ctx.ranks, dim=1), strict=True):
            product = frozen_product(reader.layer, flat, quantized)
            product.addmm_(part, up.to(dtype).t(), alpha=_factor(reader, mask))
            products.append(unlike_a_view(product, (*inputs.shape[:-1], product.shape[-1])))
        ctx.save_for_backward(read, narrow, *factors)
        return tuple(products)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        read, narrow, *factors = ctx.saved_tensors
        if all(each is None for each in outer):
            return (None,) * (3 + len(factors))
        readers, downs = ctx.readers, factors[: len(ctx.readers)]
        gradients = [None if each is None else each.reshape(-1, each.shape[-1]).to(read.dtype) for each in outer]
        narrow_gradient, up_gradients = _through_up(ctx, gradients, narrow, factors[len(readers) :])
        inputs = None
        if ctx.needs_input_grad[0]:
            inputs = _input_gradient(ctx, gradients, narrow_gradient, _stacked(downs, read.dtype))
            inputs = inputs.view(*ctx.leading, inputs.shape[-1]).to(ctx.input_dtype)
        if ctx.mask is not None and ctx.pool == 1:
            down_gradient = dropped_gradient(narrow_gradient, read, ctx.mask).to(downs[0].dtype)
        else:
            down_gradient = _product_in(downs[0].dtype, narrow_gradient.t(), read)
        rows = zip(down_gradient.split(ctx.ranks), gradients, strict=True)
        return inputs, None, None, *(None if each is None else row for row, each in rows), *up_gradients


def _through_up(
    ctx: Any, gradients: Sequence[torch.Tensor | None], narrow: torch.Tensor, ups: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The gradient of the narrow product, and those of each B; None for a linear whose output nobody used."""
    narrow_gradient, up_gradients = torch.empty_like(narrow), list[torch.Tensor | None]()
    parts = (both.split(ctx.ranks, dim=1) for both in (narrow, narrow_gradient))
    for reader, up, gradient, part, back in zip(ctx.readers, ups, gradients, *parts, strict=True):
        if gradient is None:
            back.zero_()
            up_gradients.append(None)
            continue
        scaling = _factor(reader, ctx.mask)
        back.addmm_(gradient, up.to(narrow.dtype), beta=0, alpha=scaling)
        up_gradients.append(_product_in(up.dtype, gradient.t(), part).mul_(scaling))
    return narrow_gradient, up_gradients


def _factor(reader: Reader, mask: Mask | None) -> float:
    """What B A is multiplied by: what dropout leaves stands for all."""
    return reader.scaling if mask is None else reader.scaling / (1.0 - mask.share)


def _stacked(downs: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """All A as one matrix [sum of r, in] in `dtype`."""
    return downs[0].to(dtype) if len(downs) == 1 else torch.cat([down.to(dtype) for down in downs])


def _narrowed(
    flat: torch.Tensor, down: torch.Tensor, pool: int, mask: Mask | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What A reads, kept for its gradient, and the product with A; of inputs [tokens, in]."""
    if mask is not None and pool == 1:
        return flat, dropped_product(flat, down, mask)
    read = flat if mask is None else dropped(flat, mask)
    read = read if pool == 1 else means(read, pool)  # sums would overflow in float16
    return read, read @ down.t()


def _input_gradient(
    ctx: Any, gradients: Sequence[torch.Tensor | None], narrow_gradient: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The gradient of the inputs, [tokens, in], from those of the outputs and of the narrow product."""
    used = [(reader.layer, each) for reader, each in zip(ctx.readers, gradients, strict=True) if each is not None]
    total = frozen_input_gradient(*used[0])
    for layer, gradient in used[1:]:
        add_frozen_input_gradient(layer, gradient, total)
    # A as wide as the inputs is small, and adding within the product is a pass over memory less.
    wide = down.repeat_interleave(ctx.pool, dim=1) if ctx.pool > 1 else down
    if ctx.mask is None:
        return total.addmm_(narrow_gradient, wide, alpha=1 / ctx.pool)
    add_dropped(total, narrow_gradient, wide, ctx.mask, 1 / ctx.pool)
    return total


def _product_in(dtype: torch.dtype, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, rounded once to `dtype` if the device supports it."""
    if left.is_cuda and left.dtype != dtype:
        product: torch.Tensor = torch.mm(left, right, out_dtype=dtype)
        return product
    return (left @ right).to(dtype)
