"""Quantizes one linear by GPTQ: input by input, each error compensated by the inputs still to come.

Frantar et al. 2022 (arXiv 2210.17323), algorithm 1. Matrices here are [in, out]: an input's weights lie together.
"""

from typing import NamedTuple

import torch

from qdist.core.errors import ModelError
from qdist.core.model.gptq import Shape
from qdist.runtime.formats.gptq_folder import Quantized
from qdist.runtime.kernels.gptq_bits import dequantize, pack, pack_zeros
from qdist.runtime.kernels.gptq_solve import Grid, fit, round_block

DAMPING = 0.01
_MOST_DAMPING = 100.0
_BLOCK = 128
"""Inputs whose errors are propagated in one product (the paper's lazy batch updates); at most a group's inputs."""
_COLUMNS = 1 << 11
"""Columns of a triangular inverse that are computed at a time."""
_PAIRS = 1 << 11
"""Inputs whose products with all later ones are computed at a time, to measure a linear's error."""


class Curvature(NamedTuple):
    """How much errors in each input's weights matter, and how other inputs can compensate them."""

    hessian: torch.Tensor
    """float32 [in, in], undamped."""
    order: torch.Tensor
    """int64 [in]: the inputs in processing order."""
    upper: torch.Tensor
    """float32 [in, in], U of U^T U = the inverse of the damped Hessian, inputs in `order`."""
    damping: float
    """Fraction of the mean diagonal that was finally added to it."""

    def to(self, device: torch.device) -> "Curvature":
        """A copy on another device, with the same memory layout."""
        return self._replace(hessian=self.hessian.to(device), order=self.order.to(device), upper=self.upper.to(device))


class Solution(NamedTuple):
    """One quantized linear, unpacked."""

    shape: Shape
    codes: torch.Tensor
    """uint8 [in, out]."""
    zeros: torch.Tensor
    """int16 [groups, out]."""
    scales: torch.Tensor
    """float16 [groups, out]."""
    groups: torch.Tensor
    """int32 [in]: the group of each input."""
    error: float
    """||(W - Q) X||^2 / ||W X||^2 over the calibration inputs."""

    def weight(self) -> torch.Tensor:
        """float32 [out, in], as a checkpoint's reader computes it."""
        rows = self.groups.long()
        return ((self.codes.float() - self.zeros.float()[rows]) * self.scales.float()[rows]).t()

    def packed(self, *, offset: int, name: str) -> Quantized:
        """The linear's words for the file. offset: what its format subtracts from a zero."""
        return Quantized(
            qweight=pack(self.codes, self.shape.bits),
            qzeros=pack_zeros(self.zeros, self.shape.bits, offset, name=name),
            scales=self.scales,
            g_idx=self.groups,
        )


def curvature(hessian: torch.Tensor, *, damping: float = DAMPING, by_activation: bool, name: str) -> Curvature:
    """Order and factor a Hessian 2 X X^T / n, float32 [in, in]; linears that read the same inputs share it.

    damping: the part of the mean diagonal that is added to it, ten times more until a Cholesky factor exists.
    by_activation: take inputs by falling diagonal (`desc_act`), else as they are.
    Raises ModelError for NaN and for a matrix that is not a Hessian.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ModelError(f"{name} reads inputs that are NaN or infinite", try_="other data, or a --dtype of more range")
    diagonal = hessian.diagonal().clone()
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    # An input that is always zero says nothing of its weights: they are rounded, and disturb nobody.
    diagonal[~live] = mean
    order = torch.argsort(diagonal, descending=True, stable=True) if by_activation else torch.arange(len(diagonal))
    order = order.to(hessian.device)
    back = order.flip(0)
    mirrored = hessian[back][:, back] if by_activation else hessian.flip(0, 1)
    while damping <= _MOST_DAMPING:
        mirrored.diagonal().copy_(diagonal[back] + damping * mean)
        upper = _factor_of_inverse(mirrored)
        if upper is not None:
            return Curvature(hessian, order, upper, damping)
        damping *= 10
    raise ModelError(f"{name}: the Hessian of its inputs has no Cholesky factor at any damping", try_="other data")


def _factor_of_inverse(mirrored: torch.Tensor) -> torch.Tensor | None:
    """Upper U with U^T U = matrix^-1, or None where the matrix is not positive definite in float32.

    mirrored: the matrix with rows and columns reversed. There it is L L^T, which makes it R R^T for an upper R, and
    U = R^-1: one factor and one triangular inverse, where the inverse itself would lose digits.
    """
    lower, failed = torch.linalg.cholesky_ex(mirrored)
    if int(failed):
        return None
    factor = lower.flip(0, 1)
    del lower  # as large as the Hessian, as is each matrix here
    upper = mirrored.new_zeros(mirrored.shape)
    for start in range(0, len(factor), _COLUMNS):
        # Nothing below the diagonal: the first columns need the first rows alone, together two fifths of the work.
        part = factor[: start + _COLUMNS, : start + _COLUMNS]
        identity = part.new_zeros(len(part), len(part) - start)
        identity[start:].fill_diagonal_(1)
        upper[: len(part), start : start + _COLUMNS] = torch.linalg.solve_triangular(part, identity, upper=True)
    # Of a whole matrix `isfinite` would make three more.
    return upper if bool(torch.isfinite(upper.sum(0)).all()) else None


def solve(
    weight: torch.Tensor,
    inputs: Curvature,
    shape: Shape,
    *,
    sym: bool,
    lowest_zero: int = 0,
    search: bool = True,
    name: str,
) -> Solution:
    """Quantize a weight [out, in] for the calibration inputs.

    lowest_zero: 1 where the format holds no zero of 0. search: see `fit`. name: the module's path.
    Raises ModelError naming the module for NaN in its weights or in the solution.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"{name} has weights that are NaN or infinite", try_="download the model again")
    # Weights as they still have to be quantized: those of later inputs make good the errors of earlier ones.
    left = weight.to(torch.float32).t()[inputs.order].contiguous()
    codes, grids = torch.empty(left.shape, dtype=torch.uint8, device=left.device), list[Grid]()
    count, pivots = len(left), inputs.upper.diagonal()
    size = count if shape.group_size == -1 else shape.group_size
    for start in range(0, count, min(_BLOCK, size)):
        end = min(start + min(_BLOCK, size), count)
        if start % size == 0:
            importance, rows = pivots[start : start + size] ** -2, left[start : start + size]
            grids.append(fit(rows, importance, shape.bits, sym=sym, lowest_zero=lowest_zero, search=search))
        scale, zero, top = grids[-1]
        rounded = round_block(left[start:end], inputs.upper[start:end, start:end], scale, zero, top=top)
        codes[start:end] = rounded.codes
        left[end:].addmm_(inputs.upper[start:end, end:].t(), rounded.errors, alpha=-1)
    scales = torch.stack([grid.scale for grid in grids])
    # An error that is not finite makes all that come after it in its output so: the last ones tell.
    if not bool(torch.isfinite(rounded.errors).all() & torch.isfinite(scales).all()):
        raise ModelError(f"{name}: its solution is NaN or beyond float16", try_="--damping 0.1, or more --samples")
    groups = (torch.arange(count, device=left.device) // size).to(torch.int32)
    solution = Solution(
        shape=shape,
        codes=torch.empty_like(codes).index_copy_(0, inputs.order, codes),
        zeros=torch.stack([grid.zero for grid in grids]).to(torch.int16),
        scales=scales.to(torch.float16),
        groups=torch.empty_like(groups).index_copy_(0, inputs.order, groups),
        error=0.0,
    )
    return solution._replace(error=relative_error(weight, solution.weight(), inputs.hessian))


def relative_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """||(W - Q) X||^2 / ||W X||^2 of weights [out, in], from X X^T alone; 0 if there were no inputs."""
    size = _size(weight.float(), hessian)
    return _size(weight.float() - quantized.float(), hessian) / size if size > 0 else 0.0


def _size(weights: torch.Tensor, hessian: torch.Tensor) -> float:
    """||W X||^2 of weights [out, in]; X X^T is symmetric, so that each pair of inputs is multiplied once."""
    total = torch.zeros((), dtype=torch.float64, device=weights.device)
    for start in range(0, len(hessian), _PAIRS):
        end = start + _PAIRS
        rows, later = weights[:, start:end], weights[:, end:]
        total += ((rows @ hessian[start:end, start:end]) * rows).sum()
        total += 2 * ((rows @ hessian[start:end, end:]) * later).sum()
    return float(total)


def unpacked(linear: Quantized, bits: int, *, offset: int) -> torch.Tensor:
    """float32 [out, in]: the weights of a linear in the file, bit for bit those of `Solution.weight`."""
    values = dequantize(
        linear.qweight, linear.qzeros, linear.scales, linear.g_idx, bits=bits, offset=offset, dtype=torch.float32
    )
    return values.t()
