"""Unpacks MXFP4: blocks of 32 four-bit floats that share a power of two, as gpt-oss' checkpoints have their experts."""

from functools import cache
from typing import Any

import torch

from qdist.core.model.storage import MX_BLOCK
from qdist.runtime.kernels.launching import on_device

BIAS = 127
"""What is subtracted from a stored exponent."""
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of e2m1; the fourth bit is the sign."""


@cache
def code_book(device: torch.device) -> torch.Tensor:
    """The 16 values of a nibble, float32."""
    return torch.tensor([*_VALUES, *(-value for value in _VALUES)], device=device)


@cache
def _pair_book(device: torch.device) -> torch.Tensor:
    """The two values of a byte, float32 [256, 2], the low nibble's first."""
    book, byte = code_book(device), torch.arange(256, device=device)
    return torch.stack([book[byte & 15], book[byte >> 4]], dim=1)


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Matrices [..., out, in] in `dtype`.

    blocks: uint8 [..., out, in / 32, 16], two weights a byte, the first in the low nibble. scales: uint8 [..., out,
    in / 32], exponents with a bias of 127.
    """
    if blocks.is_cuda:
        return _fused(blocks, scales, dtype)
    return dequantize_reference(blocks, scales, dtype)


def dequantize_reference(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same through torch's own operators."""
    values = _pair_book(blocks.device)[blocks.int()].flatten(-2)
    # Products of e2m1 values and powers of two are exact in float32, so they are rounded once.
    scaled = torch.ldexp(values, (scales.int() - BIAS).unsqueeze(-1))
    return scaled.to(dtype).flatten(-2)


def _fused(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One kernel that reads 0.53 bytes and writes one `dtype` per weight."""
    out = torch.empty((*scales.shape[:-1], scales.shape[-1] * MX_BLOCK), dtype=dtype, device=blocks.device)
    groups, rows = scales.numel(), 64
    with on_device(blocks.device):
        _kernel()[(-(-groups // rows),)](
            blocks.contiguous(), scales.contiguous(), code_book(blocks.device), out, groups, ROWS=rows, num_warps=8
        )
    return out


@cache
def _kernel() -> Any:
    """The kernel, compiled on first use: Triton exists only with a GPU."""
    import triton
    import triton.language as tl

    @triton.jit
    def unpack(blocks, scales, book, out, groups, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        there = group < groups
        exponent = tl.load(scales + group, mask=there, other=0).to(tl.int32)
        # A power of two by its bits; the least one is subnormal.
        scale = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
        place = group.to(tl.int64)[:, None] * 16 + tl.arange(0, 16)[None, :]
        pair = tl.load(blocks + place, mask=there[:, None], other=0).to(tl.int32)
        first = tl.load(book + (pair & 15)) * scale[:, None]
        second = tl.load(book + (pair >> 4)) * scale[:, None]
        both = tl.interleave(first, second)
        place = group.to(tl.int64)[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(out + place, both.to(out.dtype.element_ty), mask=there[:, None])

    return unpack
