"""GPTQ's inner loops on a GPU: fitting a group's grid, and rounding with error propagation."""

from functools import cache
from typing import Any, NamedTuple

import torch

from qdist.runtime.kernels.launching import LAUNCHING, on_device

_COLUMNS, _WARPS = 8, 1
"""Outputs per program, and warps per program."""


class Rounded(NamedTuple):
    """A rounded block of inputs."""

    codes: torch.Tensor
    """uint8 [n, out]."""
    errors: torch.Tensor
    """float32 [n, out], each divided by its input's pivot: the errors that later blocks compensate."""


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
    """`round_block` in one launch; fused multiply-adds may change a code by one if a weight is midway."""
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
    """The kernel, compiled on first use: Triton exists only with a GPU."""
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


_SHRINKS = tuple(1 - step / 40 for step in range(1, 21))
"""Fractions of a group's range to try: a grid that clips extremes is finer for all other weights."""
_AT_ONCE = 1 << 24
"""Weights that torch rounds at a time while trying ranges: 64 MiB of them, or one range."""
_SMALLEST_SCALE = 2.0**-24
"""float16's smallest positive number."""
_MOST_ROWS, _COLUMNS, _WARPS = 128, 16, 4
"""Inputs and outputs per Triton program, and its warps."""


class Grid(NamedTuple):
    """The values that a group's weights may take: scale x (code - zero), codes from 0 to `top`."""

    scale: torch.Tensor
    """float32 [out], representable in float16: what is stored is what was optimized. [grids, out] for several grids."""
    zero: torch.Tensor
    """float32 [out], integers."""
    top: int

    def codes(self, weights: torch.Tensor) -> torch.Tensor:
        """The nearest codes of weights [..., out], float32."""
        return (weights / self.scale + self.zero).round_().clamp_(0, self.top)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The values of codes [..., out], float32."""
        return (codes - self.zero) * self.scale


def fit(
    weights: torch.Tensor, importance: torch.Tensor, bits: int, *, sym: bool, lowest_zero: int, search: bool = True
) -> Grid:
    """The grid of a group, weights [n, out] in float32: their whole range, or with `search` a better part of it.

    importance: float32 [n], what a squared error in each input's weights costs (in GPTQ: 1 / U_ii^2).
    lowest_zero: 1 where the format holds no zero of 0.
    """
    way = triton_fit if weights.is_cuda else torch_fit
    return way(weights, importance, bits, sym=sym, lowest_zero=lowest_zero, search=search)


def torch_fit(
    weights: torch.Tensor, importance: torch.Tensor, bits: int, *, sym: bool, lowest_zero: int, search: bool = True
) -> Grid:
    """`fit`, trying several ranges at a time."""
    low, high = weights.amin(0).clamp_(max=0), weights.amax(0).clamp_(min=0)
    shrinks = _shrinks(weights.device)[: None if search else 1, None]
    tried = _grid(low * shrinks, high * shrinks, bits, sym=sym, lowest_zero=lowest_zero)
    at_once = max(1, _AT_ONCE // weights.numel())
    costs = torch.cat(
        [
            _cost(Grid(scale, zero, tried.top), weights, importance)
            for scale, zero in zip(tried.scale.split(at_once), tried.zero.split(at_once), strict=True)
        ]
    )
    best = costs.argmin(0, keepdim=True)
    return Grid(tried.scale.gather(0, best)[0], tried.zero.gather(0, best)[0], tried.top)


@cache
def _shrinks(device: torch.device) -> torch.Tensor:
    """The fractions, copied to the device once: copying a few numbers to a GPU waits for all its pending work."""
    return torch.tensor((1.0, *_SHRINKS), device=device)


def _grid(low: torch.Tensor, high: torch.Tensor, bits: int, *, sym: bool, lowest_zero: int) -> Grid:
    """The grids from low <= 0 to high >= 0, [..., out]."""
    top = (1 << bits) - 1
    if sym:
        scale = _stored(2 * torch.maximum(-low, high) / top)
        return Grid(scale, torch.full_like(scale, 1 << (bits - 1)), top)
    if lowest_zero:
        low = torch.minimum(low, -high / (top - 1))
    scale = _stored((high - low) / top)
    return Grid(scale, (-low / scale).round_().clamp_(lowest_zero, top), top)


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """Scales rounded to float16; 1 for groups without weights."""
    rounded = scale.to(torch.float16).to(torch.float32).clamp_(min=_SMALLEST_SCALE)
    return torch.where(scale == 0, torch.ones_like(scale), rounded)


def _cost(grid: Grid, weights: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """The cost of rounding a group [n, out] on each of several grids [grids, out], [grids, out]."""
    one_each = Grid(grid.scale[:, None], grid.zero[:, None], grid.top)
    return importance @ (one_each.values(one_each.codes(weights)) - weights).square_()


def triton_fit(
    weights: torch.Tensor, importance: torch.Tensor, bits: int, *, sym: bool, lowest_zero: int, search: bool = True
) -> Grid:
    """`fit` in one launch; among ranges whose costs are equal up to rounding it may choose another."""
    rows, outputs = weights.shape
    top, shrinks = (1 << bits) - 1, _shrinks(weights.device)
    height = min(_MOST_ROWS, 1 << (rows - 1).bit_length())
    scale, zero = (torch.empty(outputs, device=weights.device) for _ in range(2))
    with LAUNCHING, on_device(weights.device):
        _grid_kernel()[(-(-outputs // _COLUMNS),)](
            weights.contiguous(), importance.contiguous(), shrinks, scale, zero, rows, outputs, float(lowest_zero),
            TOP=top, TRIED=len(shrinks) if search else 1, SYM=sym, BLOCKS=-(-rows // height),
            ROWS=height, COLUMNS=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    return Grid(scale, zero, top)


@cache
def _grid_kernel() -> Any:
    """The kernel, compiled on first use: Triton exists only with a GPU."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(  # type: ignore[no-untyped-def]
        weights, importance, shrinks, scale, zero, rows, outputs, lowest_zero, TOP: tl.constexpr, TRIED: tl.constexpr,
        SYM: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        there = column < outputs
        low = tl.zeros([COLUMNS], tl.float32)
        high = tl.zeros([COLUMNS], tl.float32)
        for block in range(BLOCKS):
            row = block * ROWS + tl.arange(0, ROWS)
            tile = tl.load(
                weights + row.to(tl.int64)[:, None] * outputs + column[None, :],
                mask=(row < rows)[:, None] & there[None, :],
                other=0.0,
            )
            low = tl.minimum(low, tl.min(tile, 0))
            high = tl.maximum(high, tl.max(tile, 0))
        best = tl.full([COLUMNS], float("inf"), tl.float32)
        best_scale = tl.full([COLUMNS], 1.0, tl.float32)
        best_zero = tl.zeros([COLUMNS], tl.float32)
        for tried in range(TRIED):
            shrink = tl.load(shrinks + tried)
            bottom, roof = low * shrink, high * shrink
            if SYM:
                step = tl.math.div_rn(2 * tl.maximum(-bottom, roof), tl.full([COLUMNS], TOP, tl.float32))
            else:
                if lowest_zero > 0:
                    bottom = tl.minimum(bottom, tl.math.div_rn(-roof, tl.full([COLUMNS], TOP - 1, tl.float32)))
                step = tl.math.div_rn(roof - bottom, tl.full([COLUMNS], TOP, tl.float32))
            held = tl.maximum(step.to(tl.float16).to(tl.float32), 5.9604644775390625e-08)  # float16's smallest
            step = tl.where(step == 0.0, 1.0, held)
            if SYM:
                origin = tl.full([COLUMNS], (TOP + 1) // 2, tl.float32)
            else:
                origin = (tl.math.div_rn(-bottom, step) + 12582912.0) - 12582912.0  # 1.5 x 2^23: ties to even
                origin = tl.minimum(tl.maximum(origin, lowest_zero), TOP)
            cost = tl.zeros([COLUMNS], tl.float32)
            for block in range(BLOCKS):
                row = block * ROWS + tl.arange(0, ROWS)
                tile = tl.load(
                    weights + row.to(tl.int64)[:, None] * outputs + column[None, :],
                    mask=(row < rows)[:, None] & there[None, :],
                    other=0.0,
                )
                weight = tl.load(importance + row, mask=row < rows, other=0.0)
                steps = tl.broadcast_to(step[None, :], [ROWS, COLUMNS])
                place = tl.minimum(tl.maximum(tl.math.div_rn(tile, steps) + origin[None, :], 0.0), TOP)
                code = (place + 12582912.0) - 12582912.0
                error = (code - origin[None, :]) * steps - tile
                cost += tl.sum(weight[:, None] * error * error, 0)
            better = (cost < best) | (tried == 0)
            best = tl.where(better, cost, best)
            best_scale = tl.where(better, step, best_scale)
            best_zero = tl.where(better, origin, best_zero)
        tl.store(scale + column, best_scale, mask=there)
        tl.store(zero + column, best_zero, mask=there)

    return kernel
