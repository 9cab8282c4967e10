"""Small packed linears of random weights, as kernels take them."""

import torch

from qdist.runtime.kernels.fp8 import FourBit
from qdist.runtime.kernels.small_product import Gptq, StackedAdapter


def four_bits(outputs: int, width: int, kind: str, *, nested: bool, seed: int = 0) -> FourBit:
    """A linear as bitsandbytes packs it."""
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed)) * 0.02
    packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    outer = (state.state2.absmax, state.offset.view(1)) if nested else None
    return FourBit(packed, state.absmax, outer, kind, (outputs, width))


def gptq(outputs: int, width: int, group_size: int, *, bits: int = 4, seed: int = 0) -> Gptq:
    """A linear of random words."""
    generator = torch.Generator().manual_seed(seed)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)

    groups = 1 if group_size == -1 else width // group_size
    scales = torch.rand(groups, outputs, generator=generator).half() * 0.01
    return Gptq(
        words(width * bits // 32, outputs), words(groups, outputs * bits // 32), scales, None, bits, 1, group_size
    )


def adapter(outputs: tuple[int, ...], ranks: tuple[int, ...], width: int, tokens: int) -> StackedAdapter:
    """Random A, B and a mask that leaves out every second rank of every second token."""
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(sum(ranks), width, generator=generator) * 0.05
    ups = tuple(torch.randn(size, rank, generator=generator) * 0.05 for size, rank in zip(outputs, ranks, strict=True))
    mask = torch.ones(tokens + 1, sum(ranks))
    mask[::2, 1::2] = 0
    return StackedAdapter(down, ups, mask)
