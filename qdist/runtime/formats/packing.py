"""Matrices as bitsandbytes packs them, on disk and in memory: a linear's, and those of a layer's experts."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from qdist.core.model.storage import BLOCK, NESTED_BLOCK, Packing, matrix_bytes

_PIECE = 1 << 22
"""Elements packed at a time: bitsandbytes' CPU kernels need 16 bytes each besides the matrix."""
_CODES_BYTES, _STATE_BYTES = 4 * 16, 256
"""Bytes besides a 4-bit matrix: its code book, and at most the state as JSON."""


def pack_matrix(weight: torch.Tensor, packing: Packing, device: torch.device) -> dict[str, torch.Tensor]:
    """A matrix [out, in] in 16 or 32 bits as the tensors that transformers saves, by name suffix after the module's.

    The work is done on `device` in pieces, the result is on the CPU. The same bytes as packing it in one go.
    """
    if packing.bits == 8:
        rows, scale = _int8(weight, device)
        return {"weight": rows, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}  # by rows
    parts = _four_bit(weight, packing, device)
    return {"weight": parts.values, **_quant_state(weight, parts, packing, device)}


def pack_experts(matrices: Iterable[torch.Tensor], packing: Packing, device: torch.device) -> dict[str, torch.Tensor]:
    """A parameter of experts, [rows, columns] each, packed a matrix at a time; by suffix of its name, with the dot.

    4 bits: .weight uint8 [E, bytes], .absmax [E, blocks], and with double quantization .nested_absmax
    [E, nested blocks] and .nested_offset [E] in float32. 8 bits: .weight int8 [E, rows, columns], .scale [E, rows].
    matrices: a 3-D tensor, or its matrices one after the other. The result is on the CPU.
    """
    packed = [_of_expert(matrix, packing, device) for matrix in matrices]
    return {suffix: torch.stack([expert[suffix] for expert in packed]) for suffix in packed[0]}


def expert_suffixes(packing: Packing) -> tuple[str, ...]:
    """Suffixes of what `pack_experts` makes."""
    if packing.bits == 8:
        return ".weight", ".scale"
    return (".weight", ".absmax", *((".nested_absmax", ".nested_offset") if packing.double else ()))


def packed_bytes(shape: tuple[int, ...], packing: Packing) -> int:
    """An upper bound on the bytes of `pack_matrix`'s result, within a hundred."""
    size = _bytes_of(shape, packing)
    absmax_codes = 4 * 256 if packing.double else 0
    return size + (1 if packing.bits == 8 else absmax_codes + _CODES_BYTES + _STATE_BYTES)


def packed_experts_bytes(shape: tuple[int, ...], packing: Packing) -> int:
    """Bytes of `pack_experts`' result. shape: [E, rows, columns]."""
    return shape[0] * _bytes_of(shape[1:], packing)


def _bytes_of(shape: tuple[int, ...], packing: Packing) -> int:
    rows, columns = shape
    return matrix_bytes(columns, rows, bits=packing.bits, double=packing.double)


def _of_expert(matrix: torch.Tensor, packing: Packing, device: torch.device) -> dict[str, torch.Tensor]:
    if packing.bits == 8:
        rows, scale = _int8(matrix, device)
        return {".weight": rows, ".scale": scale}
    parts = _four_bit(matrix, packing, device)
    found = {".weight": parts.values.reshape(-1), ".absmax": parts.absmax.cpu()}
    if parts.nested is not None and parts.offset is not None:
        found |= {".nested_absmax": parts.nested.absmax.cpu(), ".nested_offset": parts.offset.float().cpu()}
    return found


class _FourBit(NamedTuple):
    """A matrix in 4 bits and what undoes it."""

    values: torch.Tensor
    """uint8 [bytes, 1], on the CPU."""
    absmax: torch.Tensor
    offset: torch.Tensor | None
    nested: Any
    """bitsandbytes' state of the absmaxes; None unless they are quantized."""


def _four_bit(weight: torch.Tensor, packing: Packing, device: torch.device) -> _FourBit:
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    packed, absmaxes = [], []
    for piece in weight.reshape(-1).split(_PIECE):
        values, state = quantize_4bit(
            piece.to(device), blocksize=BLOCK, compress_statistics=False, quant_type=packing.type
        )
        packed.append(values.cpu())
        absmaxes.append(state.absmax)
    absmax = torch.cat(absmaxes)
    offset, nested = None, None
    if packing.double:  # as `quantize_4bit(compress_statistics=True)` does it
        offset = absmax.mean()
        absmax, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return _FourBit(torch.cat(packed), absmax, offset, nested)


def _quant_state(
    weight: torch.Tensor, parts: _FourBit, packing: Packing, device: torch.device
) -> dict[str, torch.Tensor]:
    """bitsandbytes' state of a 4-bit matrix as transformers saves it."""
    from bitsandbytes.functional import QuantState, get_4bit_type

    whole = QuantState(
        absmax=parts.absmax,
        shape=weight.shape,
        code=get_4bit_type(packing.type, device=device),
        blocksize=BLOCK,
        quant_type=packing.type,
        dtype=weight.dtype,
        offset=parts.offset,
        state2=parts.nested,
    )
    return {f"weight.{name}": value.cpu() for name, value in whole.as_dict(packed=True).items()}


def _int8(weight: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in bytes by rows, and the scale of each row."""
    from bitsandbytes.functional import int8_vectorwise_quant

    pieces = weight.split(max(1, _PIECE // weight.shape[1]))
    parts = [int8_vectorwise_quant(piece.to(device, torch.float16)) for piece in pieces]
    return torch.cat([part[0].cpu() for part in parts]), torch.cat([part[1].cpu() for part in parts])
