"""Products in fp8 (e4m3): rows of activations and of packed weights with a scale each, multiplied by torch.

A row r of x is held as e4m3 values q and a float32 scale s with x[r] = s[r] q[r]. Products accumulate in 32 bits and
are scaled once, when they are written. The kernels are in `fp8_triton`; on a CPU, torch computes the same.
"""

from functools import cache
from typing import NamedTuple

import torch

from qdist.core.model.storage import BLOCK, NESTED_BLOCK
from qdist.runtime.kernels.four_bit import absmax_code_book, code_book
from qdist.runtime.kernels.launching import on_device

FP8 = torch.float8_e4m3fn
LARGEST = {FP8: 448.0, torch.int8: 127.0, torch.float32: 448.0}
"""Largest number in each type of values that the kernels write. Products are of fp8; int8 is for bench/fp8.py, and
float32 is fp8 before it is rounded."""
ALIGNED = 16
"""Inputs and outputs of a matrix that torch multiplies in fp8 are a multiple of this."""
_SMALLEST = 1e-12
"""Smallest largest magnitude of a row, so that rows of zeros have a scale."""
_ROWS, _COLUMNS = 128, 64
"""Rows and columns that one program converts."""


class Scaled(NamedTuple):
    """A matrix in fp8."""

    values: torch.Tensor
    """e4m3; of weights [out, in], or [in, out] if they are transposed."""
    scale: torch.Tensor
    """float32, of each row; of weights, transposed or not, of each output."""


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    """The scales, float32, of rows whose magnitudes are at most these."""
    return largest.float().clamp_min(_SMALLEST) / LARGEST[FP8]


def quantize_tokens(inputs: torch.Tensor, factors: torch.Tensor | None = None) -> Scaled:
    """Activations or gradients [tokens, width] in fp8, each token by its own largest magnitude.

    factors: float32 [width], multiplied with every token first: the scales of the weights' rows, which a product over
    the rows cannot apply itself.
    """
    if inputs.is_cuda:
        return triton_quantize_tokens(inputs.contiguous(), factors)
    wide = inputs.float() if factors is None else inputs.float() * factors
    scale = scale_of(wide.abs().amax(1))
    return Scaled((wide / scale.unsqueeze(1)).to(FP8), scale)


def triton_quantize_tokens(inputs: torch.Tensor, factors: torch.Tensor | None, *, dtype: torch.dtype = FP8) -> Scaled:
    """The same in one pass over contiguous inputs. dtype: of the values, one of `LARGEST`."""
    from qdist.runtime.kernels import fp8_triton

    tokens, width = inputs.shape
    values = torch.empty((tokens, width), dtype=dtype, device=inputs.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=inputs.device)
    block = 1 << (width - 1).bit_length()
    with on_device(inputs.device):
        fp8_triton.quantize_rows[(tokens,)](
            inputs, inputs if factors is None else factors, values, scale, width, FACTORS=factors is not None,
            LARGEST=LARGEST[dtype], WIDTH=block, num_warps=min(16, max(4, block // 1024)),
        )  # fmt: skip
    return Scaled(values, scale)


def convert(matrix: torch.Tensor, scale: torch.Tensor, *, transposed: bool) -> Scaled:
    """Weights [out, in] of any float type and strides in fp8, or their transpose. scale: float32 [out]."""
    if matrix.is_cuda:
        return triton_convert(matrix, scale, transposed=transposed)
    values = (matrix.float() / scale.unsqueeze(1)).to(FP8)
    return Scaled(values.t().contiguous() if transposed else values.contiguous(), scale)


def triton_convert(matrix: torch.Tensor, scale: torch.Tensor, *, transposed: bool, dtype: torch.dtype = FP8) -> Scaled:
    """The same in one pass over memory. dtype: as for `triton_quantize_tokens`."""
    from qdist.runtime.kernels import fp8_triton

    outputs, inputs = matrix.shape
    values = torch.empty((inputs, outputs) if transposed else (outputs, inputs), dtype=dtype, device=matrix.device)
    written = values.t() if transposed else values
    with on_device(matrix.device):
        fp8_triton.convert[(-(-outputs // _ROWS), -(-inputs // _COLUMNS))](
            matrix, scale, values, outputs, inputs, *matrix.stride(), *written.stride(), ROWS=_ROWS, COLUMNS=_COLUMNS,
            num_warps=8,
        )  # fmt: skip
    return Scaled(values, scale)


class FourBit(NamedTuple):
    """A matrix that bitsandbytes packed, whose rows are whole blocks; tensors as in `four_bit.dequantize`."""

    packed: torch.Tensor
    absmax: torch.Tensor
    nested: tuple[torch.Tensor, torch.Tensor] | None
    quant_type: str
    shape: tuple[int, int]


def triton_row_scales(weights: FourBit, *, dtype: torch.dtype = FP8) -> torch.Tensor:
    """The scale of each row, from its largest absmax: code books end at 1. dtype: as for `triton_quantize_tokens`."""
    from qdist.runtime.kernels import fp8_triton

    outputs, inputs = weights.shape
    blocks, device = inputs // BLOCK, weights.packed.device
    scale = torch.empty(outputs, dtype=torch.float32, device=device)
    with on_device(device):
        fp8_triton.row_scales[(-(-outputs // 8),)](
            *_absmaxes(weights), scale, outputs, blocks, NESTED=weights.nested is not None, NESTED_BLOCK=NESTED_BLOCK,
            LARGEST=LARGEST[dtype], ROWS=8, BLOCKS=1 << (blocks - 1).bit_length(), num_warps=4,
        )  # fmt: skip
    return scale


def triton_unpack(weights: FourBit, scale: torch.Tensor, *, transposed: bool, dtype: torch.dtype = FP8) -> Scaled:
    """4-bit weights in fp8, in one pass over memory. scale, dtype: those of `triton_row_scales`."""
    from qdist.runtime.kernels import fp8_triton

    (outputs, inputs), device = weights.shape, weights.packed.device
    values = torch.empty((inputs, outputs) if transposed else (outputs, inputs), dtype=dtype, device=device)
    stride = (1, outputs) if transposed else (inputs, 1)
    with on_device(device):
        fp8_triton.unpack[(-(-outputs // _ROWS), inputs // BLOCK)](
            weights.packed, *_absmaxes(weights), code_book(weights.quant_type, device), scale, values, outputs,
            inputs // BLOCK, *stride, NESTED=weights.nested is not None, NESTED_BLOCK=NESTED_BLOCK, ROWS=_ROWS,
            BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return Scaled(values, scale)


def _absmaxes(weights: FourBit) -> tuple[torch.Tensor, ...]:
    """What kernels read absmaxes from: themselves, their code book, nested absmaxes and offset."""
    if weights.nested is None:
        return (weights.absmax,) * 4
    return weights.absmax, absmax_code_book(weights.packed.device), *weights.nested


def product(inputs: Scaled, weights: Scaled) -> torch.Tensor:
    """inputs [tokens, in] times weights [out, in], bfloat16 [tokens, out]."""
    return _multiply(inputs, weights.values, weights.scale)


def input_gradient(gradient: torch.Tensor, weights: Scaled) -> torch.Tensor:
    """The gradient of a product's inputs from that of its outputs, bfloat16 [tokens, in].

    gradient: [tokens, out], not yet in fp8. weights: transposed, [in, out]: the bytes that the forward pass multiplies.
    """
    scale = ones(weights.values.shape[0], gradient.device)
    return _multiply(quantize_tokens(gradient, weights.scale), weights.values, scale)


@cache
def ones(count: int, device: torch.device) -> torch.Tensor:
    """The scales of outputs that have none, float32: torch wants them, and filling them takes a launch."""
    return torch.ones(count, dtype=torch.float32, device=device)


def _multiply(left: Scaled, right: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    multiplied: torch.Tensor = torch._scaled_mm(
        left.values,
        right.t(),
        scale_a=left.scale.unsqueeze(1),
        scale_b=scale.unsqueeze(0),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return multiplied
