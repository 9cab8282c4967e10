"""The forward pass of a layer's routed experts: tokens sorted by expert, over frozen matrices, with or without LoRA."""

from collections.abc import Mapping
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from qdist.core.errors import ModelError
from qdist.runtime.kernels.grouped import Pairs, outer_products, products
from qdist.runtime.model.packed import compute_dtype
from qdist.runtime.model.packed_experts import (
    Matrices,
    PackedMatrices,
    PlainMatrices,
    expert_gradients,
    expert_products,
)

GATED, UNGATED, LAST = "gate_up_proj", "up_proj", "down_proj"
"""Names of the parameters of an experts' module: the first product's with and without a gate, and the second's."""


class Factors(NamedTuple):
    """What LoRA adds to the matrix of each expert: scaling x up down."""

    down: torch.Tensor
    """A, float32 [experts, r, in]."""
    up: torch.Tensor
    """B, float32 [experts, out, r]."""
    scaling: float


def compute_experts(module: nn.Module, path: str) -> None:
    """Have an experts' module of transformers compute its forward pass here.

    The parameters that it needs are gate_up_proj or up_proj, and down_proj, each maybe with a bias (`..._bias`); any
    may be `PackedMatrices` by now. Raises ModelError if it is of another kind.
    """
    if not is_computed(module):
        raise ModelError(
            f"{path} is a {type(module).__name__}, whose experts are computed in a way that qdist does not know",
            try_="a model with experts as those of Qwen3-MoE, Mixtral or gpt-oss",
        )
    module.forward = MethodType(_experts_forward, module)


def is_computed(module: nn.Module) -> bool:
    """Whether the forward pass of an experts' module of transformers is one that is known here."""
    known = hasattr(module, first_name(module)) and hasattr(module, LAST)
    return known and (hasattr(module, "_apply_gate") or first_name(module) == UNGATED)


def is_experts(module: nn.Module) -> bool:
    """Whether `compute_experts` was called for a module."""
    return bool(module.forward == MethodType(_experts_forward, module))


def first_name(module: nn.Module) -> str:
    """The name of the parameter that the first product of experts reads."""
    return GATED if hasattr(module, GATED) else UNGATED


def is_transposed(module: nn.Module) -> bool:
    """Whether the parameters of an experts' module are [experts, in, out]."""
    return bool(getattr(module, "is_transposed", False))


def matrices_of(module: nn.Module, name: str) -> Matrices:
    """The matrices of a parameter of an experts' module, packed or not."""
    held = getattr(module, name)
    if isinstance(held, PackedMatrices):
        return held
    return PlainMatrices(held, transposed=is_transposed(module))


def _experts_forward(
    module: nn.Module,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    factors: Mapping[str, Factors] | None = None,
) -> torch.Tensor:
    """The sum of each token's experts by their weights, [tokens, hidden].

    hidden: [tokens, hidden]. index, weights: the experts of each token and their weights, [tokens, experts a token].
    factors: LoRA's, by the name of the parameter.
    """
    given = factors or {}
    first, last = given.get(first_name(module)), given.get(LAST)
    tensors = [tensor for each in (first, last) for tensor in (each[:2] if each else (None, None))]
    scalings = tuple(each.scaling if each else 0.0 for each in (first, last))
    result: torch.Tensor = _Experts.apply(hidden, weights, *tensors, index, module, scalings)
    return result


class _Product(NamedTuple):
    """One of the two products of an expert."""

    matrices: Matrices
    bias: torch.Tensor | None
    """[experts, out]"""
    factors: Factors | None

    @classmethod
    def of(cls, module: nn.Module, name: str, factors: Factors | None) -> "_Product":
        return cls(matrices_of(module, name), getattr(module, f"{name}_bias", None), factors)

    def biases(self, pairs: Pairs, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias of each pair's expert."""
        if self.bias is None:
            return None
        return self.bias.to(pairs.experts.device, dtype)[pairs.experts]

    def outputs(self, rows: torch.Tensor, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The product without a bias, and LoRA's narrow one [pairs, r]."""
        product = expert_products(rows, self.matrices, pairs)
        if self.factors is None:
            return product, None
        down, up = (each.to(rows.dtype).contiguous().transpose(1, 2) for each in self.factors[:2])
        narrow = products(rows, down, pairs)
        return product.add_(products(narrow, up, pairs), alpha=self.factors.scaling), narrow

    def gradients(
        self, gradient: torch.Tensor, rows: torch.Tensor | None, narrow: torch.Tensor | None, pairs: Pairs
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of the rows and of LoRA's A and B, from that of the outputs. rows: read for A's alone."""
        inputs = expert_gradients(gradient, self.matrices, pairs)
        if self.factors is None or rows is None or narrow is None:
            return inputs, None, None
        down, up = (each.to(gradient.dtype).contiguous() for each in self.factors[:2])
        narrow_gradient = products(gradient, up, pairs).mul_(self.factors.scaling)
        inputs.add_(products(narrow_gradient, down, pairs))
        up_gradient = outer_products(gradient, narrow, pairs).mul_(self.factors.scaling)
        return inputs, outer_products(narrow_gradient, rows, pairs), up_gradient


class _Experts(torch.autograd.Function):
    """y = sum over a token's experts of w (W2 h + b), h = gate(W1 x + b'), all W frozen.

    Weights w are multiplied with h, so that their gradient needs nothing that is as wide as the hidden states. Kept for
    the backward pass: x if W1 is adapted, what the gate reads, and LoRA's narrow products. Weights are unpacked anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        down: torch.Tensor | None,
        up: torch.Tensor | None,
        last_down: torch.Tensor | None,
        last_up: torch.Tensor | None,
        index: torch.Tensor,
        module: nn.Module,
        scalings: tuple[float, float],
    ) -> torch.Tensor:
        first, last = _both(module, (down, up), (last_down, last_up), scalings)
        pairs, dtype = Pairs(index, first.matrices.shape[0]), compute_dtype(hidden)
        rows = pairs.gathered(hidden.reshape(-1, hidden.shape[-1]).to(dtype))
        gated, narrow = first.outputs(rows, pairs)
        if (bias := first.biases(pairs, dtype)) is not None:
            gated.add_(bias)
        weight = weights.reshape(-1, 1)[pairs.order]
        wide = (_gate(module, gated) * weight).to(dtype)
        result, last_narrow = last.outputs(wide, pairs)
        if (bias := last.biases(pairs, dtype)) is not None:
            result.add_((bias * weight).to(dtype))
        read = hidden if down is not None else None
        ctx.save_for_backward(read, weights, down, up, last_down, last_up, index, gated, narrow, last_narrow)
        ctx.module, ctx.scalings, ctx.shape, ctx.dtypes = module, scalings, hidden.shape, (hidden.dtype, dtype)
        return pairs.summed(result).to(hidden.dtype).view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weights, down, up, last_down, last_up, index, gated, narrow, last_narrow = ctx.saved_tensors
        first, last = _both(ctx.module, (down, up), (last_down, last_up), ctx.scalings)
        pairs, (hidden_dtype, dtype) = Pairs(index, first.matrices.shape[0]), ctx.dtypes
        outer = pairs.gathered(gradients[0].reshape(-1, ctx.shape[-1]).to(dtype))
        weight = weights.reshape(-1, 1)[pairs.order]
        with torch.enable_grad():
            leaf = gated.detach().requires_grad_()
            activated = _gate(ctx.module, leaf)
        plain = activated.detach()
        wide = (plain * weight).to(dtype) if last.factors else None
        wide_gradient, *last_factors = last.gradients(outer, wide, last_narrow, pairs)
        weight_gradient = (wide_gradient * plain).sum(-1, dtype=weight.dtype)
        if (bias := last.biases(pairs, dtype)) is not None:
            weight_gradient += (outer * bias).sum(-1, dtype=weight.dtype)
        (gate_gradient,) = torch.autograd.grad(activated, leaf, (wide_gradient * weight).to(activated.dtype))
        rows = pairs.gathered(hidden.reshape(-1, ctx.shape[-1]).to(dtype)) if first.factors else None
        rows_gradient, *factors = first.gradients(gate_gradient, rows, narrow, pairs)
        inputs = pairs.summed(rows_gradient).to(hidden_dtype).view(ctx.shape)
        weights_gradient = weight_gradient[pairs.places].view(weights.shape)
        return inputs, weights_gradient, *factors, *last_factors, None, None, None


def _both(
    module: nn.Module, first: tuple[Any, Any], last: tuple[Any, Any], scalings: tuple[float, float]
) -> tuple[_Product, _Product]:
    """The first and the second product, with LoRA's factors where there are any."""
    factors = [
        None if down is None else Factors(down, up, scaling)
        for (down, up), scaling in zip((first, last), scalings, strict=True)
    ]
    return _Product.of(module, first_name(module), factors[0]), _Product.of(module, LAST, factors[1])


def _gate(module: Any, values: torch.Tensor) -> torch.Tensor:
    """What the module makes of its first product."""
    gated: torch.Tensor = (module._apply_gate if hasattr(module, GATED) else module.act_fn)(values)
    return gated
