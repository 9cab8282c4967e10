"""Frozen linear layers whose packed weights are parameters, so that any placement can move, shard or split them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional

from qdist.core.errors import ModelError
from qdist.core.model.storage import BLOCK, blocks_of
from qdist.core.spec.sections import Compute, Quant
from qdist.host.opening import told
from qdist.runtime.kernels import fp8
from qdist.runtime.kernels.four_bit import absmax_code_book, dequantize

FEW_TOKENS = 16
"""Most tokens that a GPU multiplies with packed weights; above, unpacking first is faster (H100 and H200)."""
DEVIATION = 0.02
"""Standard deviation of random weights."""


class Slices(Protocol):
    """A tensor on disk or in memory that can be read by rows."""

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """The rows, on any device."""


@runtime_checkable
class PackedModule(Protocol):
    """A module whose weights are packed."""

    kind: str
    """nf4, fp4, int8, gptq, mxfp4."""
    bits: int
    """Bits of a weight, without its share of scales."""


class PackedLinear(nn.Linear):
    """A frozen linear [out_features, in_features]; subclasses define the packing.

    It is an `nn.Linear` to libraries that look for one; `weight` holds packed bytes.
    """

    kind: str
    bits: int
    compute: Compute | None = None
    """Arithmetic of its products in training; None for that of the tensors that are multiplied."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self._row_scales: torch.Tensor | None = None
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, dtype
        self.register_parameter("bias", empty((out_features,), dtype) if bias else None)

    def matrix(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The unpacked weights, [out_features, in_features]."""
        raise NotImplementedError

    def unpacked(self, device: torch.device) -> torch.Tensor:
        """The weights as products use them, float32 [out_features, in_features]: rounded to the compute dtype."""
        return self.matrix(self.compute_dtype, device).to(torch.float32, copy=True)

    def product(self, inputs: torch.Tensor, quantized: fp8.Scaled | None = None) -> torch.Tensor:
        """inputs [tokens, in_features] times the weights, plus bias: a new tensor [tokens, out_features].

        quantized: the inputs in fp8, if they were quantized for all linears that read them.
        """
        if self.multiplies_in_fp8(inputs):
            return self._product_in_fp8(fp8.quantize_tokens(inputs) if quantized is None else quantized)
        bias = None if self.bias is None else self.bias.to(inputs.device, inputs.dtype)
        return functional.linear(inputs, self.matrix(inputs.dtype, inputs.device), bias)

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the inputs from that of the outputs, [tokens, out_features]."""
        if self.multiplies_in_fp8(gradient):
            return self._input_gradient_in_fp8(gradient)
        return gradient @ self.matrix(gradient.dtype, gradient.device)

    def add_input_gradient(self, gradient: torch.Tensor, total: torch.Tensor) -> None:
        """Add `input_gradient` to a sum [tokens, in_features]: inside the product, which spares a pass over memory."""
        if self.multiplies_in_fp8(gradient):
            total.add_(self._input_gradient_in_fp8(gradient))
        else:
            total.addmm_(gradient, self.matrix(gradient.dtype, gradient.device))

    def multiplies_in_fp8(self, given: torch.Tensor) -> bool:
        """Whether a product with these rows is in fp8: in training, and where there are more than a few."""
        wanted = self.compute == "fp8" and self.training
        return wanted and given.dtype == torch.bfloat16 and given.shape[0] > FEW_TOKENS

    def _product_in_fp8(self, inputs: fp8.Scaled) -> torch.Tensor:
        product = fp8.product(inputs, self.in_fp8(inputs.values.device, transposed=False))
        return product if self.bias is None else product.add_(self.bias.to(product.device, product.dtype))

    def _input_gradient_in_fp8(self, gradient: torch.Tensor) -> torch.Tensor:
        return fp8.input_gradient(gradient, self.in_fp8(gradient.device, transposed=True))

    def in_fp8(self, device: torch.device, *, transposed: bool) -> fp8.Scaled:
        """The weights in fp8, with a scale for each output."""
        scales = self.row_scales(device)
        return fp8.convert(self.matrix(torch.bfloat16, device), scales, transposed=transposed)

    def row_scales(self, device: torch.device) -> torch.Tensor:
        """The scales of `in_fp8`, float32 [out_features]: computed once, as weights do not change in training."""
        if self._row_scales is not None and self._row_scales.device == device:
            return self._row_scales
        scales = self.find_row_scales(device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():  # a capture computes nothing yet
            self._row_scales = scales
        return scales

    def find_row_scales(self, device: torch.device) -> torch.Tensor:
        """Scales with which no weight of a row exceeds fp8's range, float32 [out_features]."""
        return fp8.scale_of(self.matrix(torch.bfloat16, device).abs().amax(1))

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """A float matrix as the tensors that the layer holds, by their names in it."""
        raise NotImplementedError

    def drawn(self, matrix: Callable[[], torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random tensors for this layer; by default a packed random matrix.

        matrix: makes weights of N(0, 0.02), [out, in]. generator: for who needs no matrix.
        """
        return self.pack(matrix())

    def stored(self, file: Mapping[str, Slices]) -> dict[str, Slices]:
        """The layer's tensors as checkpoints of its kind store them, by their names in the layer."""
        raise NotImplementedError

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Frozen.apply(inputs, self)
        return product

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class Packed4bit(PackedLinear):
    """NF4 or FP4 in blocks of 64 (QLoRA, Dettmers et al. 2023), with or without quantized absmaxes."""

    bits = 4

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, quant: Quant) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.quant, self.kind = quant, quant.type
        count = in_features * out_features
        blocks, nested_blocks = blocks_of(count)
        self.weight = empty(((count + 1) // 2, 1), torch.uint8)
        self.absmax = empty((blocks,), torch.uint8 if quant.double else torch.float32)
        # A 32,768th of the weights: whole on every rank.
        nested = torch.empty(nested_blocks, device="meta") if quant.double else None
        self.register_buffer("nested_absmax", nested, persistent=False)
        self.register_buffer("nested_offset", torch.empty(1, device="meta") if quant.double else None, persistent=False)

    def matrix(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        own = self.tensors_on(device)
        return dequantize(own.packed, own.absmax, own.nested, quant_type=own.quant_type, shape=own.shape, dtype=dtype)

    def in_fp8(self, device: torch.device, *, transposed: bool) -> fp8.Scaled:
        if not self._has_whole_blocks_on(device):
            return super().in_fp8(device, transposed=transposed)
        return fp8.triton_unpack(self.tensors_on(device), self.row_scales(device), transposed=transposed)

    def find_row_scales(self, device: torch.device) -> torch.Tensor:
        if not self._has_whole_blocks_on(device):
            return super().find_row_scales(device)
        return fp8.triton_row_scales(self.tensors_on(device))

    def _has_whole_blocks_on(self, device: torch.device) -> bool:
        """Whether rows are whole blocks, and on a GPU, so that Triton converts them packed."""
        return device.type == "cuda" and self.in_features % BLOCK == 0

    def tensors_on(self, device: torch.device) -> fp8.FourBit:
        """The packed tensors on a device."""
        weight, absmax = self.weight, self.absmax
        if weight.device != device:
            weight, absmax = weight.to(device, non_blocking=True), absmax.to(device, non_blocking=True)
        nested = (self.nested_absmax, self.nested_offset) if self.quant.double else None
        return fp8.FourBit(weight, absmax, nested, self.quant.type, (self.out_features, self.in_features))

    def product(self, inputs: torch.Tensor, quantized: fp8.Scaled | None = None) -> torch.Tensor:
        if not inputs.is_cuda or inputs.shape[0] > FEW_TOKENS or is_offloaded(self):
            return super().product(inputs, quantized)
        scales = (
            {"absmax_8bit": self.absmax, "absmax_code": absmax_code_book(inputs.device)} if self.quant.double else {}
        )
        if self.quant.double:
            scales["absmax_offset"] = self.nested_offset
        product: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit(
            inputs,
            self.weight,
            (self.out_features, self.in_features),
            self.nested_absmax if self.quant.double else self.absmax,
            BLOCK,
            self.quant.type,
            bias=None if self.bias is None else self.bias.to(inputs.dtype),
            **scales,
        )
        return product

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            weight, blocksize=BLOCK, quant_type=self.quant.type, compress_statistics=self.quant.double
        )
        tensors = {"weight": packed, "absmax": state.absmax}
        if self.quant.double:
            tensors |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset.reshape(1)}
        return tensors

    def stored(self, file: Mapping[str, Slices]) -> dict[str, Slices]:
        import json

        tensors: dict[str, Slices] = {"weight": file["weight"], "absmax": file["weight.absmax"]}
        if self.quant.double:
            state = bytes(file[f"weight.quant_state.bitsandbytes__{self.quant.type}"][:].tolist())
            tensors["nested_absmax"] = file["weight.nested_absmax"]
            with told("the state of packed weights", ModelError, try_="pack the model again"):
                tensors["nested_offset"] = torch.tensor([json.loads(state)["nested_offset"]], dtype=torch.float32)
        return tensors


class Packed8bit(PackedLinear):
    """LLM.int8 (Dettmers et al. 2022): a byte per weight, a scale per row; input outliers are multiplied in 16 bits."""

    kind, bits = "int8", 8
    threshold = 6.0

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.weight = empty((out_features, in_features), torch.int8)
        self.scale = empty((out_features,), torch.float32)
        """The largest magnitude of each row; bitsandbytes' SCB."""

    def matrix(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        scale = self.scale.to(device).unsqueeze(1).mul(1.0 / 127.0)
        return self.weight.to(device, non_blocking=True).to(dtype, copy=True).mul_(scale)

    def product(self, inputs: torch.Tensor, quantized: fp8.Scaled | None = None) -> torch.Tensor:
        import bitsandbytes as bnb

        state = bnb.MatmulLtState()
        state.threshold, state.has_fp16_weights = self.threshold, False
        state.is_training = inputs.device.type == "cpu"  # there bitsandbytes multiplies unpacked weights
        weight = self.weight.to(inputs.device, non_blocking=True)
        state.CB, state.SCB = weight, self.scale.to(inputs.device)
        bias = None if self.bias is None else self.bias.to(inputs.device, inputs.dtype)
        with torch.no_grad():
            product: torch.Tensor = bnb.matmul(inputs, weight, bias=bias, threshold=self.threshold, state=state)
        return product

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        from bitsandbytes.functional import int8_vectorwise_quant

        packed, scale, _ = int8_vectorwise_quant(weight.to(torch.float16))
        return {"weight": packed, "scale": scale}

    def stored(self, file: Mapping[str, Slices]) -> dict[str, Slices]:
        return {"weight": file["weight"], "scale": file["SCB"]}


class _Frozen(torch.autograd.Function):
    """A frozen product that saves only the layer for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, inputs.dtype
        dtype = compute_dtype(inputs)
        product = layer.product(inputs.reshape(-1, inputs.shape[-1]).to(dtype))
        return unlike_a_view(product, (*inputs.shape[:-1], layer.out_features))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradients[0]
        flat = gradient.reshape(-1, gradient.shape[-1])
        inputs = ctx.layer.input_gradient(flat)
        return inputs.reshape(*gradient.shape[:-1], -1).to(ctx.dtype), None


def unlike_a_view(result: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """What an autograd function returns, in another shape: torch lets no model add to a view in place (Falcon)."""
    reshaped: torch.Tensor = torch.ops.aten._unsafe_view(result.contiguous(), shape)
    return reshaped


def set_compute(model: nn.Module, compute: Compute) -> None:
    """Have the packed linears of a model that is trained multiply in fp8, but for those of shapes that torch does not.

    Evaluation, and products of a few tokens, stay in 16 bits: a model is judged as it will be served.
    """
    for module in model.modules():
        if isinstance(module, PackedLinear) and not (module.in_features | module.out_features) % fp8.ALIGNED:
            module.compute = compute


def quantize_for(layers: Iterable[nn.Linear], inputs: torch.Tensor) -> fp8.Scaled | None:
    """Inputs [tokens, in] in fp8, once for all linears that read them; None if none of these multiplies in fp8."""
    if any(isinstance(layer, PackedLinear) and layer.multiplies_in_fp8(inputs) for layer in layers):
        return fp8.quantize_tokens(inputs)
    return None


def frozen_product(layer: nn.Linear, inputs: torch.Tensor, quantized: fp8.Scaled | None = None) -> torch.Tensor:
    """inputs [tokens, in] times the weights of a frozen linear, plus its bias.

    quantized: the same inputs from `quantize_for`, if it was asked.
    """
    if isinstance(layer, PackedLinear):
        return layer.product(inputs, quantized)
    bias = None if layer.bias is None else layer.bias.to(inputs.device, inputs.dtype)
    return functional.linear(inputs, layer.weight.to(inputs.device, inputs.dtype, non_blocking=True), bias)


def frozen_input_gradient(layer: nn.Linear, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of a frozen linear's inputs, [tokens, in]."""
    if isinstance(layer, PackedLinear):
        return layer.input_gradient(gradient)
    return gradient @ layer.weight.to(gradient.device, gradient.dtype, non_blocking=True)


def add_frozen_input_gradient(layer: nn.Linear, gradient: torch.Tensor, total: torch.Tensor) -> None:
    """Add a frozen linear's input gradient to a sum [tokens, in]."""
    if isinstance(layer, PackedLinear):
        layer.add_input_gradient(gradient, total)
    else:
        total.addmm_(gradient, layer.weight.to(gradient.device, gradient.dtype, non_blocking=True))


def compute_dtype(inputs: torch.Tensor) -> torch.dtype:
    """The dtype a linear computes in: autocast's if enabled, else the inputs'."""
    kind = inputs.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype


def is_offloaded(module: nn.Module) -> bool:
    """Whether a linear's weights are offloaded to host memory; its attribute `runs_on` is where it computes."""
    return getattr(module, "offloaded", False)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A frozen parameter without storage yet."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
