"""Means of consecutive inputs (QA-LoRA's pooling): one pass over memory, and a torch fallback."""

from functools import cache
from typing import Any

import torch

from qdist.runtime.kernels.launching import on_device

_MANY = 1 << 22
"""Elements above which Triton's slower launch pays off; torch reduces short rows at a fraction of memory bandwidth."""
_ROWS = 128
"""Groups per program."""


def means(inputs: torch.Tensor, pool: int) -> torch.Tensor:
    """[tokens, in] to [tokens, in / pool], rounded once. `pool` divides in."""
    if inputs.is_cuda and inputs.numel() >= _MANY and pool & (pool - 1) == 0:
        return triton_means(inputs.contiguous(), pool)
    return inputs.reshape(inputs.shape[0], -1, pool).mean(-1)


def add_pooled_gradient(inputs: torch.Tensor, gradient: torch.Tensor, pool: int) -> None:
    """Add the gradient of group sums, [tokens, in / pool], to the gradient of inputs [tokens, in]."""
    inputs.view(*gradient.shape, pool).add_(gradient.unsqueeze(-1))


def triton_means(inputs: torch.Tensor, pool: int) -> torch.Tensor:
    """`means` of contiguous inputs, for a pool that is a power of two; accumulated in float32."""
    out = torch.empty((inputs.shape[0], inputs.shape[1] // pool), dtype=inputs.dtype, device=inputs.device)
    groups = out.numel()
    with on_device(inputs.device):
        _kernel()[(-(-groups // _ROWS),)](inputs, out, groups, POOL=pool, ROWS=_ROWS, num_warps=4)
    return out


@cache
def _kernel() -> Any:
    """The kernel, compiled on first use: Triton exists only with a GPU."""
    import triton
    import triton.language as tl

    @triton.jit
    def reduce(inputs, out, groups, POOL: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        there = group < groups
        place = group.to(tl.int64)[:, None] * POOL + tl.arange(0, POOL)[None, :]
        values = tl.load(inputs + place, mask=there[:, None], other=0.0).to(tl.float32)
        mean = tl.sum(values, axis=1) / POOL
        tl.store(out + group, mean.to(out.dtype.element_ty), mask=there)

    return reduce
