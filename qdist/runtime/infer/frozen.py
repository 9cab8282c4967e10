"""In what form do the frozen weights of linears that read one tensor multiply fastest here?"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import nn

from qdist.core.planning.answering import UNPACKED_SHARE
from qdist.core.text import format_bytes
from qdist.host.machine.probe import host_memory
from qdist.runtime.kernels.small_product import (
    MOST_TOKENS,
    Gptq,
    Member,
    StackedAdapter,
    add_adapter,
    has_kernel,
    small_products,
    split_columns,
)
from qdist.runtime.model.packed import Packed4bit, PackedLinear, frozen_product, is_offloaded
from qdist.runtime.model.packed_gptq import PackedGptq


class Frozen(Protocol):
    """Frozen linears that read one tensor."""

    dtype: torch.dtype
    """What they compute in."""

    def products(self, inputs: torch.Tensor, adapter: StackedAdapter | None) -> Sequence[torch.Tensor]:
        """inputs [tokens, in] times the weights of each, plus bias and adapter: [tokens, out], which may be views."""


class Held:
    """Weights as the layers hold them; on a GPU, few tokens are multiplied with all of them in one launch."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = layers
        self.dtype = dtype_of(layers[0])
        self._members = [member for member in map(member_of, layers) if member is not None]
        alike = len({layer.bias is None for layer in layers}) == 1  # a launch adds the biases of all or of none
        self._has_kernel = alike and len(self._members) == len(layers) and has_kernel(self._members)

    def products(self, inputs: torch.Tensor, adapter: StackedAdapter | None) -> Sequence[torch.Tensor]:
        if self._has_kernel and inputs.is_cuda and len(inputs) <= MOST_TOKENS:
            return small_products(inputs, self._members, adapter)
        products = [frozen_product(layer, inputs) for layer in self._layers]
        return products if adapter is None else add_adapter(products, inputs, adapter)


def member_of(layer: nn.Linear) -> Member | None:
    """A packed linear as the kernels for few tokens take it; None for one that they do not."""
    if is_offloaded(layer):
        return None
    if isinstance(layer, Packed4bit):
        return Member(layer.tensors_on(layer.weight.device), layer.bias)
    if isinstance(layer, PackedGptq) and layer.shift is None:
        shape = layer.shape
        tensors = (layer.weight, layer.qzeros, layer.scales, layer.g_idx)
        return Member(Gptq(*tensors, shape.bits, layer.offset, shape.group_size), layer.bias)
    return None


class Unpacked:
    """Weights unpacked once, for one product; [in, sum of out], which a CPU reads faster for a few tokens."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.dtype = dtype_of(layers[0])
        self._sizes = [layer.out_features for layer in layers]
        self._weight = torch.cat([_unpacked(layer, self.dtype) for layer in layers]).t().contiguous()
        self._bias = _biases(layers, self.dtype)

    @property
    def weights(self) -> Sequence[torch.Tensor]:
        """The weights of each linear, [out, in]: views."""
        return self._weight.t().split(self._sizes)

    def products(self, inputs: torch.Tensor, adapter: StackedAdapter | None) -> Sequence[torch.Tensor]:
        bias = self._bias
        product = torch.mm(inputs, self._weight) if bias is None else torch.addmm(bias, inputs, self._weight)
        products = split_columns(product, self._sizes)
        return products if adapter is None else add_adapter(products, inputs, adapter)


class Reordered(Unpacked):
    """The same in bfloat16 in the order in which oneDNN reads a matrix, which it else arranges for every product."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__(layers)
        self._ordered = torch.ops.mkldnn._reorder_linear_weight(self._weight.t().contiguous(), 1)
        self._weight = self._weight.new_empty(0)

    @property
    def weights(self) -> Sequence[torch.Tensor]:
        return [self._weight] * len(self._sizes)

    def products(self, inputs: torch.Tensor, adapter: StackedAdapter | None) -> Sequence[torch.Tensor]:
        product = torch.ops.mkldnn._linear_pointwise(inputs, self._ordered, self._bias, "none", [], "")
        products = split_columns(product, self._sizes)
        return products if adapter is None else add_adapter(products, inputs, adapter)


def dtype_of(layer: nn.Linear) -> torch.dtype:
    """The dtype that a frozen linear computes in."""
    return layer.compute_dtype if isinstance(layer, PackedLinear) else layer.weight.dtype


class Form(NamedTuple):
    """How the frozen weights of a model are kept while it answers."""

    unpacked: bool
    note: str
    """The same for people, with its bytes; empty if it is the form that they were loaded in."""

    def frozen(self, layers: Sequence[nn.Linear]) -> Frozen:
        """Linears that read one tensor in this form, or as they are if it would change their products."""
        if not self.unpacked or not all(may_unpack(layer) for layer in layers):
            return Held(layers)
        ordered = dtype_of(layers[0]) == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return Reordered(layers) if ordered else Unpacked(layers)


def choose_form(layers: Sequence[nn.Linear]) -> Form:
    """Unpacked on a CPU with the memory for it: torch unpacks packed weights there for every product."""
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    if not layers or not all(layer.weight.device.type == "cpu" and not is_offloaded(layer) for layer in layers):
        return Form(False, "")
    need = sum(layer.in_features * layer.out_features * dtype_of(layer).itemsize for layer in packed)
    available = host_memory(Path("/"))[1]
    if need > UNPACKED_SHARE * available:
        reason = f"unpacked they would take {format_bytes(need)} of {format_bytes(available)}"
        return Form(False, f"weights are unpacked for every product: {reason}")
    dtype = str(dtype_of(layers[0])).removeprefix("torch.")
    return Form(True, f"{packed[0].kind} weights unpacked to {dtype}, {format_bytes(need)}" if packed else "")


def may_unpack(layer: nn.Linear) -> bool:
    """Whether unpacked weights give a layer's products: offsets of a QA-LoRA merge are lost in 16 bits."""
    shifted = isinstance(layer, PackedGptq) and layer.shift is not None
    return not shifted or dtype_of(layer) == torch.float32


def _unpacked(layer: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The weights that a layer multiplies with, [out, in]."""
    if not isinstance(layer, PackedLinear):
        return layer.weight.detach().to(dtype)
    device = layer.weight.device
    # In float32 the offsets of a QA-LoRA merge are part of the weights.
    return layer.unpacked(device) if dtype == torch.float32 else layer.matrix(dtype, device)


def _biases(layers: Sequence[nn.Linear], dtype: torch.dtype) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    zeros = [torch.zeros(layer.out_features, dtype=dtype, device=layer.weight.device) for layer in layers]
    biases = [zero if layer.bias is None else layer.bias for layer, zero in zip(layers, zeros, strict=True)]
    return torch.cat([bias.detach().to(dtype) for bias in biases])
