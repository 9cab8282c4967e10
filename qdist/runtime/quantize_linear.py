"""Packs one matrix as bitsandbytes stores it: NF4 or FP4 in blocks, or LLM.int8 by rows, a piece at a time."""

import torch

from qdist.core.memory import BLOCK, NESTED_BLOCK
from qdist.core.packing import Packing

_PIECE = 1 << 22
"""Elements unpacked at a time: bitsandbytes' CPU kernels take 16 bytes each beside the matrix."""


def pack_matrix(weight: torch.Tensor, packing: Packing, device: torch.device) -> dict[str, torch.Tensor]:
    """A matrix [out, in] in 16 or 32 bits as the tensors that transformers saves, by their names after the module's.

    The work is done on `device` in pieces, the result is on the CPU. The same bytes as packing it in one go.
    """
    return _four_bit(weight, packing, device) if packing.bits == 4 else _int8(weight, device)


def packed_bytes(shape: tuple[int, ...], packing: Packing) -> int:
    """An upper bound for what `pack_matrix` returns, within a hundred bytes."""
    rows, columns = shape
    if packing.bits == 8:
        return rows * columns + 4 * rows + 1
    blocks = -(-rows * columns // BLOCK)
    absmax = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 * 256 if packing.double else 4 * blocks
    return (rows * columns + 1) // 2 + absmax + 4 * 16 + 256  # the codes' table, and the state as JSON


def _four_bit(weight: torch.Tensor, packing: Packing, device: torch.device) -> dict[str, torch.Tensor]:
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise

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
    whole = QuantState(
        absmax=absmax,
        shape=weight.shape,
        code=get_4bit_type(packing.type, device=device),
        blocksize=BLOCK,
        quant_type=packing.type,
        dtype=weight.dtype,
        offset=offset,
        state2=nested,
    )
    stored = {f"weight.{name}": value.cpu() for name, value in whole.as_dict(packed=True).items()}
    return {"weight": torch.cat(packed), **stored}


def _int8(weight: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    from bitsandbytes.functional import int8_vectorwise_quant

    pieces = weight.split(max(1, _PIECE // weight.shape[1]))
    parts = [int8_vectorwise_quant(piece.to(device, torch.float16)) for piece in pieces]
    return {
        "weight": torch.cat([part[0].cpu() for part in parts]),
        "SCB": torch.cat([part[1].cpu() for part in parts]),
        "weight_format": torch.tensor(0, dtype=torch.uint8),  # by rows
    }
