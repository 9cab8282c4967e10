"""What do a layer's kernels take that are no products: norms, activations, rotations and sums?"""

from qdist.core.model.shapes import LayerShape
from qdist.core.planning.cost import Cost, Kernels, total

NORM_BACK = 5.5
"""Accesses that the backward pass of Liger's RMS norm takes the time of: it moves 3, at 2.24 TB/s of an H200's 4.2."""
UNFUSED_NORM, UNFUSED_NORM_BACK = (16, 6), (32, 10)
"""(16-bit accesses per element, kernels) of an RMS norm of torch's operations, forward and backward: upcast, square,
mean, scale, cast."""
TORCH_NORM, TORCH_NORM_BACK = (6, 2), (9, 4)
"""The same for torch's layer norm, which leaves autocast in fp32: one kernel, and casts of what it makes."""
UNFUSED_TURN = (12, 18)
"""(accesses per element, kernels) of a rotation of queries and keys by torch's operations, each way."""
TRITON_LAUNCHES = 2.0
"""Python's time for a Triton kernel within a function of autograd's: 40 to 60 us where torch's takes some 25."""
LAYER_LAUNCHES = 28
"""Python's way through the modules of a layer, forward, in launches of kernels: chosen on the rows of
bench/predictions.py that no graph held."""
WRITTEN_GELU, WRITTEN_GELU_BACK = (21, 10), (35, 15)
"""(accesses per element, kernels) of the GELU that BLOOM's class writes out."""


def others(shape: LayerShape, kernels: Kernels) -> tuple[Cost, Cost]:
    """Forward and backward of the rest of a layer."""
    parts = (
        _norms(shape, kernels, shape.norms * shape.hidden, shape.norms),
        _head_norms(shape, kernels),
        _activation(shape, kernels),
        _rotation(shape, kernels),
        (kernels.elementwise(6 * shape.hidden, kernels=2),) * 2,  # residual sums, and those of their gradients
        (Cost(launches=LAYER_LAUNCHES), Cost()),
    )
    return total(there for there, _ in parts), total(back for _, back in parts)


def _is_fused(shape: LayerShape, kernels: Kernels) -> bool:
    return kernels.job.fused_layers and shape.norm == "rms"


def _fused(kernels: Kernels, accesses: float, count: float = 1) -> Cost:
    """Kernels of Liger's."""
    return kernels.elementwise(accesses, kernels=count) + Cost(launches=(TRITON_LAUNCHES - 1) * count)


def _norms(shape: LayerShape, kernels: Kernels, width: float, count: int) -> tuple[Cost, Cost]:
    """Norms over `width` elements a token in all."""
    if _is_fused(shape, kernels):
        return _fused(kernels, 2 * width, count), _fused(kernels, NORM_BACK * width, count)
    ways = (TORCH_NORM, TORCH_NORM_BACK) if shape.norm == "layer" else (UNFUSED_NORM, UNFUSED_NORM_BACK)
    return _by_torch(kernels, width, *ways, count)


def _by_torch(
    kernels: Kernels, width: float, forward: tuple[int, int], backward: tuple[int, int], count: int = 1
) -> tuple[Cost, Cost]:
    """Forward and backward by torch's operations, (accesses per element, kernels), over `width` elements a token."""
    there, back = (kernels.elementwise(own[0] * width, kernels=own[1] * count) for own in (forward, backward))
    return there, back


def _head_norms(shape: LayerShape, kernels: Kernels) -> tuple[Cost, Cost]:
    """Norms of queries and keys; Liger 0.8 leaves those over all heads to torch."""
    if not shape.qk_norm:
        return Cost(), Cost()
    width = (shape.heads + shape.kv_heads) * shape.head_dim
    if shape.qk_norm == "whole":
        return _by_torch(kernels, width, UNFUSED_NORM, UNFUSED_NORM_BACK, 2)
    return _norms(shape, kernels, width, 2)


def _activation(shape: LayerShape, kernels: Kernels) -> tuple[Cost, Cost]:
    """Between an MLP's matrices."""
    if shape.mlp == "gelu" and shape.attention == "eager":
        return _by_torch(kernels, shape.inner, WRITTEN_GELU, WRITTEN_GELU_BACK)
    if shape.mlp != "gated":
        return _by_torch(kernels, shape.inner, (2, 1), (3, 1))
    if _is_fused(shape, kernels):
        return _fused(kernels, 3 * shape.inner), _fused(kernels, 5 * shape.inner)
    return _by_torch(kernels, shape.inner, (5, 2), (8, 4))


def _rotation(shape: LayerShape, kernels: Kernels) -> tuple[Cost, Cost]:
    """Of queries and keys."""
    width = (shape.heads + shape.kv_heads) * shape.head_dim
    if not width:
        return Cost(), Cost()
    if _is_fused(shape, kernels):
        return (_fused(kernels, 2 * width),) * 2
    return _by_torch(kernels, width, UNFUSED_TURN, UNFUSED_TURN)
