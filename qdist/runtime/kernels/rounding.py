"""GPTQ's inner loop: inputs of a block are rounded one after the other, and each error is carried to those after it.

Torch needs ten launches an input, a Triton program one for a whole block: its outputs do not know of each other.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

from qdist.runtime.kernels.launching import LAUNCHING, on_device

_COLUMNS, _WARPS = 8, 1
"""Outputs that one program takes, and the warps that it has."""


class Rounded(NamedTuple):
    """A block of inputs."""

    codes: torch.Tensor
    """uint8 [n, out]."""
    errors: torch.Tensor
    """float32 [n, out], each divided by its input's pivot: what later blocks make good."""


def round_block(
    left: torch.Tensor, upper: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, top: int
) -> Rounded:
    """Round weights to scale x (code - zero), codes from 0 to `top`, all of one group.

    left: float32 [n, out], n at most 128, with the errors of earlier blocks made good; not changed.
    upper: float32 [n, n], this block's part of the upper factor of the inverse Hessian.
    scale, zero: float32 [out].
    """
    return (triton_round_block if left.is_cuda else torch_round_block)(left, upper, scale, zero, top=top)


def torch_round_block(
    left: torch.Tensor, upper: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, top: int
) -> Rounded:
    """`round_block` as the paper writes it (arXiv 2210.17323, algorithm 1)."""
    left, pivots = left.clone(), upper.diagonal()
    codes, errors = torch.empty(left.shape, dtype=torch.uint8, device=left.device), torch.empty_like(left)
    for row in range(len(left)):
        code = (left[row] / scale + zero).round_().clamp_(0, top)
        errors[row] = (left[row] - (code - zero) * scale) / pivots[row]
        left[row + 1 :].addr_(upper[row, row + 1 :], errors[row], alpha=-1)
        codes[row] = code.to(torch.uint8)
    return Rounded(codes, errors)


def triton_round_block(
    left: torch.Tensor, upper: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, top: int
) -> Rounded:
    """`round_block` in one launch; contractions into fused products may move a code by one where a weight lies
    between two."""
    rows, outputs = left.shape
    codes, errors = torch.empty(left.shape, dtype=torch.uint8, device=left.device), torch.empty_like(left)
    upper = upper.contiguous()  # a triangular solution on a GPU lies column by column
    height = max(16, 1 << (rows - 1).bit_length())
    with LAUNCHING, on_device(left.device):
        _kernel()[(-(-outputs // _COLUMNS),)](
            left.contiguous(), upper, scale, zero, codes, errors, outputs, upper.stride(0), float(top), COUNT=rows,
            ROWS=height, COLUMNS=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    return Rounded(codes, errors)


@cache
def _kernel() -> Any:
    """Compiled on first use: Triton is there only with a GPU."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(  # type: ignore[no-untyped-def]
        left, upper, scale, zero, codes, errors, outputs, stride, top, COUNT: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):  # fmt: skip
        row = tl.arange(0, ROWS)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        there = column < outputs
        tile = tl.load(
            left + row[:, None] * outputs + column[None, :], mask=(row < COUNT)[:, None] & there[None, :], other=0.0
        )
        step = tl.load(scale + column, mask=there, other=1.0)
        origin = tl.load(zero + column, mask=there, other=0.0)
        for current in range(COUNT):
            weight = tl.sum(tl.where((row == current)[:, None], tile, 0.0), 0)
            place = tl.minimum(tl.maximum(tl.math.div_rn(weight, step) + origin, 0.0), top)
            code = (place + 12582912.0) - 12582912.0  # 1.5 x 2^23: to the nearest integer, ties to even
            pivot = tl.load(upper + current * stride + current)
            error = tl.math.div_rn(weight - (code - origin) * step, pivot)
            later = tl.load(upper + current * stride + row, mask=(row > current) & (row < COUNT), other=0.0)
            tile -= later[:, None] * error[None, :]
            tl.store(codes + current * outputs + column, code.to(tl.uint8), mask=there)
            tl.store(errors + current * outputs + column, error, mask=there)

    return kernel
