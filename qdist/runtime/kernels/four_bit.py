"""Unpacks bitsandbytes' 4-bit weights: nested absmax and code book in one pass over memory, with a torch fallback."""

from functools import cache
from typing import Any

import torch

from qdist.core.model.storage import BLOCK, NESTED_BLOCK
from qdist.runtime.kernels.launching import on_device


@cache
def code_book(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of NF4 or FP4, float32."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(quant_type, device=device)


@cache
def absmax_code_book(device: torch.device) -> torch.Tensor:
    """The 256 values that quantized absmaxes represent, float32."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    quant_type: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight matrix [out, in] in `dtype`.

    packed: uint8, two weights a byte, the first in the high nibble. absmax: of each 64 weights, float32, or uint8 with
    `nested` = (float32 absmax of each 256 of them, float32 [1] offset).
    """
    if packed.is_cuda and nested is not None and shape[0] * shape[1] % (2 * BLOCK) == 0:
        return _fused(packed, absmax, nested, quant_type, shape, dtype)
    return dequantize_reference(packed, absmax, nested, quant_type=quant_type, shape=shape, dtype=dtype)


def dequantize_matrices(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    quant_type: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Matrices [count, rows, columns], each packed by itself, in `dtype`.

    Arguments are those of `dequantize` with a dimension for the matrices in front: nested = (float32 [count, blocks /
    256 rounded up], float32 [count]).
    """
    if packed.is_cuda and nested is not None and shape[1] * shape[2] % (2 * BLOCK) == 0:
        return _fused(packed, absmax, nested, quant_type, shape, dtype)
    return dequantize_matrices_reference(packed, absmax, nested, quant_type=quant_type, shape=shape, dtype=dtype)


def dequantize_matrices_reference(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    quant_type: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same, a matrix at a time, unless the blocks of one end where those of the next begin."""
    if nested is None and shape[1] * shape[2] % BLOCK == 0:
        rows = (shape[0] * shape[1], shape[2])
        return dequantize_reference(
            packed, absmax.flatten(), None, quant_type=quant_type, shape=rows, dtype=dtype
        ).view(shape)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    for index in range(shape[0]):
        inner = None if nested is None else (nested[0][index], nested[1][index : index + 1])
        out[index] = dequantize_reference(
            packed[index], absmax[index], inner, quant_type=quant_type, shape=shape[1:], dtype=dtype
        )
    return out


def dequantize_reference(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    quant_type: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same through bitsandbytes' own operators."""
    import bitsandbytes  # noqa: F401  (registers the operators)

    scales = absmax
    if nested is not None:
        book = absmax_code_book(absmax.device)
        scales = torch.ops.bitsandbytes.dequantize_blockwise(absmax, nested[0], book, NESTED_BLOCK, torch.float32)
        scales = scales + nested[1]
    unpacked: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        packed.view(-1, 1), scales, BLOCK, quant_type, shape, dtype
    )
    return unpacked


def _fused(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor],
    quant_type: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """One kernel that reads 0.52 bytes and writes one `dtype` per weight, of one matrix or of several."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    blocks, matrices = absmax.numel(), nested[1].numel()
    rows = 64
    device = packed.device
    with on_device(device):
        _kernel()[(-(-blocks // rows),)](
            packed, absmax, absmax_code_book(device), nested[0], nested[1], code_book(quant_type, device),
            out, blocks, blocks // matrices, nested[0].numel() // matrices, ROWS=rows, num_warps=8,
        )  # fmt: skip
    return out


@cache
def _kernel() -> Any:
    """The kernel, compiled on first use: Triton exists only with a GPU."""
    import triton
    import triton.language as tl

    @triton.jit
    def unpack(packed, absmax, scale_book, nested, offset, book, out, blocks, per, outer, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        there = block < blocks
        code = tl.load(absmax + block, mask=there, other=0).to(tl.int32)
        matrix = block // per
        wide = tl.load(nested + matrix * outer + block % per // 256, mask=there, other=0.0)
        scale = tl.load(scale_book + code) * wide + tl.load(offset + matrix, mask=there, other=0.0)
        place = block.to(tl.int64)[:, None] * 32 + tl.arange(0, 32)[None, :]
        pair = tl.load(packed + place, mask=there[:, None], other=0).to(tl.int32)
        first = tl.load(book + (pair >> 4)) * scale[:, None]
        second = tl.load(book + (pair & 15)) * scale[:, None]
        both = tl.interleave(first, second)
        place = block.to(tl.int64)[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(out + place, both.to(out.dtype.element_ty), mask=there[:, None])

    return unpack
