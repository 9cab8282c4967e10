"""Unpacks GPTQ weights, and multiplies them while packed with a few tokens: Triton kernels and a torch fallback."""

import torch

from qdist.runtime.kernels import gptq_bits as reference
from qdist.runtime.kernels.launching import on_device

FEW_TOKENS = 4
"""Most tokens for which packed weights are read once per token; above, unpacking first is assumed to be faster."""
_ROWS, _COLUMNS = 32, 128
"""Inputs, in whole words for any width, and outputs that one program unpacks."""
_SPLIT_ROWS = 1024
"""Inputs that one program of `product` processes."""


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor | None,
    *,
    bits: int,
    offset: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """scale x (weight - zero), [in, out] in `dtype`; computed in float32.

    qweight: int32 [in * bits / 32, out]. qzeros: int32 [groups, out * bits / 32]. scales: [groups, out].
    groups: int32 [in], or None where each `group_size` inputs that follow each other are a group.
    offset: what is added to a stored zero.
    """
    if qweight.is_cuda:
        return triton_dequantize(
            qweight, qzeros, scales, groups, bits=bits, offset=offset, group_size=group_size, dtype=dtype
        )
    if groups is None:
        groups = reference.group_of_inputs(qweight.shape[0] * 32 // bits, group_size, qweight.device)
    return reference.dequantize(qweight, qzeros, scales, groups, bits=bits, offset=offset, dtype=dtype)


def triton_dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor | None,
    *,
    bits: int,
    offset: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`dequantize` in one pass over memory."""
    from qdist.runtime.kernels import gptq_triton  # Triton is there only with a GPU

    inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    groups = _needed(groups, inputs, group_size, _ROWS, qweight.device)
    out = torch.empty((inputs, outputs), dtype=dtype, device=qweight.device)
    with on_device(qweight.device):
        gptq_triton.unpack[(-(-inputs // _ROWS), -(-outputs // _COLUMNS))](
            qweight, qzeros, scales, qweight if groups is None else groups, out, inputs, outputs, qzeros.shape[1],
            inputs if group_size == -1 else group_size, BITS=bits, OFFSET=offset, ORDERED=groups is not None,
            ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
    return out


def triton_product(
    inputs: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor | None,
    *,
    bits: int,
    offset: int,
    group_size: int,
) -> torch.Tensor:
    """inputs [tokens, in] times the packed weights, [tokens, out] in the inputs' dtype; accumulated in float32."""
    from qdist.runtime.kernels import gptq_triton

    values, words = reference.period(bits)
    tokens, width = inputs.shape
    outputs = qweight.shape[1]
    groups = _needed(groups, width, group_size, values, qweight.device)
    periods, rows, columns = width // values, max(1, 64 // values), 64
    each = max(rows, _SPLIT_ROWS // values)
    splits = -(-periods // each)
    parts = torch.empty((splits, tokens, outputs), dtype=torch.float32, device=inputs.device)
    with on_device(qweight.device):
        gptq_triton.product[(-(-outputs // columns), splits, tokens)](
            inputs.contiguous(), qweight, qzeros, scales, qweight if groups is None else groups, parts, periods,
            outputs, qzeros.shape[1], width, tokens, width if group_size == -1 else group_size, BITS=bits,
            OFFSET=offset, WORDS=words, VALUES=values, ORDERED=groups is not None, ROWS=rows, COLUMNS=columns,
            EACH=each, num_warps=4,
        )  # fmt: skip
    return parts.sum(0).to(inputs.dtype)


def _needed(
    groups: torch.Tensor | None, inputs: int, group_size: int, values: int, device: torch.device
) -> torch.Tensor | None:
    """None if every `values` consecutive inputs share a group; else the group of each input."""
    if groups is None and group_size != -1 and group_size % values:
        return reference.group_of_inputs(inputs, group_size, device)
    return groups
