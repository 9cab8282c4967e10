"""Multiplies a few tokens with packed weights, for decoding: linears that read the same inputs, and their adapters.

On a GPU, one Triton launch for all members, after a thin one for the adapters' A; on a CPU, and for packings that the
kernels do not take, torch. Nothing depends on values, so that a CUDA graph can hold it. Weights are multiplied as the
16 values of their code book in the inputs' dtype; sums are float32, and scaled by blocks or groups in float32.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from qdist.core.model.storage import BLOCK, NESTED_BLOCK
from qdist.runtime.kernels import four_bit, gptq
from qdist.runtime.kernels.fp8 import FourBit
from qdist.runtime.kernels.launching import on_device

MOST_TOKENS = 64
"""Most tokens that are multiplied with packed weights; above, the whole matrix is unpacked first."""
MOST_MEMBERS = 3
"""Most linears of one launch: queries, keys and values."""
_MOST_TILES = 1 << 12
"""Tiles of a launch that is split, at most."""


class Gptq(NamedTuple):
    """The tensors of a GPTQ linear: see `kernels.gptq.dequantize`."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor | None
    bits: int
    offset: int
    group_size: int


class Member(NamedTuple):
    """A frozen linear."""

    weight: FourBit | Gptq | torch.Tensor
    """Packed, or [out, in] in 16 or 32 bits."""
    bias: torch.Tensor | None = None

    @property
    def outputs(self) -> int:
        """Rows of the weight matrix."""
        if isinstance(self.weight, FourBit):
            return self.weight.shape[0]
        return self.weight.qweight.shape[1] if isinstance(self.weight, Gptq) else self.weight.shape[0]


class StackedAdapter(NamedTuple):
    """LoRA's matrices of linears that read the same inputs, of one adapter or of several, in the inputs' dtype."""

    down: torch.Tensor
    """A of all members, one below the other, [sum of ranks, in]."""
    ups: tuple[torch.Tensor, ...]
    """B of each member with the scaling in it, [out, rank]; [out, 0] for a member without an adapter."""
    mask: torch.Tensor | None = None
    """[tokens or more, sum of ranks]: 1 where a rank belongs to a token's adapter, else 0. None: all 1."""


class Tiles(NamedTuple):
    """How a launch is divided."""

    rows: int
    """Outputs of a program."""
    depth: int
    """Blocks of 64 inputs, or words of 8 for GPTQ, that a program reads at a time."""
    splits: int
    """Programs that share the inputs of a tile."""
    warps: int
    stages: int
    """Reads in flight."""


def small_products(
    inputs: torch.Tensor, members: Sequence[Member], adapter: StackedAdapter | None
) -> list[torch.Tensor]:
    """inputs [tokens, in] times each member's weights, plus bias and adapter: new tensors [tokens, out].

    At most `MOST_TOKENS` tokens go through the kernels. Multiply once before a CUDA graph is captured: kernels are
    compiled and tables made at the first call. Products of one device must follow each other: see `counters`.
    """
    given = inputs.contiguous()
    if given.is_cuda and given.shape[0] <= MOST_TOKENS and has_kernel(members):
        return triton_products(given, members, adapter)
    return torch_products(given, members, adapter)


def torch_products(
    inputs: torch.Tensor, members: Sequence[Member], adapter: StackedAdapter | None
) -> list[torch.Tensor]:
    """`small_products` with the weights unpacked."""
    products = []
    for member in members:
        bias = None if member.bias is None else member.bias.to(inputs.dtype)
        products.append(functional.linear(inputs, matrix_of(member.weight, inputs.dtype), bias))
    if adapter is None:
        return products
    return add_adapter(products, inputs, adapter)


def add_adapter(products: Sequence[torch.Tensor], inputs: torch.Tensor, adapter: StackedAdapter) -> list[torch.Tensor]:
    """The products [tokens, out] with inputs [tokens, in], with the adapter's added in place."""
    narrow = torch.mm(inputs, adapter.down.t())
    if adapter.mask is not None:
        narrow = narrow.mul_(adapter.mask[: len(inputs)])
    parts = split_columns(narrow, [up.shape[1] for up in adapter.ups])
    for product, part, up in zip(products, parts, adapter.ups, strict=True):
        if up.shape[1]:
            product.addmm_(part, up.t())
    return list(products)


def split_columns(product: torch.Tensor, sizes: Sequence[int]) -> Sequence[torch.Tensor]:
    """Views of some columns each. Not `Tensor.split`, which is written in Python: there are 240 a token in SmolLM2."""
    return [product] if len(sizes) == 1 else torch.split_with_sizes(product, sizes, dim=1)


def matrix_of(weight: FourBit | Gptq | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The unpacked weights, [out, in]."""
    if isinstance(weight, FourBit):
        return four_bit.dequantize(
            weight.packed, weight.absmax, weight.nested, quant_type=weight.quant_type, shape=weight.shape, dtype=dtype
        )
    if isinstance(weight, Gptq):
        return gptq.dequantize(
            weight.qweight, weight.qzeros, weight.scales, weight.groups, bits=weight.bits, offset=weight.offset,
            group_size=weight.group_size, dtype=dtype,
        ).t()  # fmt: skip
    return weight.to(dtype)


def has_kernel(members: Sequence[Member]) -> bool:
    """Whether one launch multiplies with all of these: of one packing, in rows of whole blocks or groups."""
    if len(members) > MOST_MEMBERS:
        return False
    weights = [member.weight for member in members]
    return _are_four_bit(weights) or _are_gptq(weights)


def _are_four_bit(weights: list[Any]) -> bool:
    if not all(isinstance(weight, FourBit) and weight.shape[1] % BLOCK == 0 for weight in weights):
        return False
    return len({(weight.quant_type, weight.nested is None) for weight in weights}) == 1


def _are_gptq(weights: list[Any]) -> bool:
    """Four bits, in groups that follow each other and are filled by `depth` words at a time."""
    if not all(isinstance(weight, Gptq) and weight.bits == 4 and weight.groups is None for weight in weights):
        return False
    whole = all(weight.group_size == -1 or weight.group_size % 32 == 0 for weight in weights)
    return whole and len({(weight.group_size, weight.offset) for weight in weights}) == 1


def triton_products(
    inputs: torch.Tensor,
    members: Sequence[Member],
    adapter: StackedAdapter | None,
    *,
    tiles: Tiles | None = None,
    narrow_splits: int | None = None,
) -> list[torch.Tensor]:
    """`small_products` of members that a kernel takes, in one launch, or two with an adapter.

    tiles, narrow_splits: for measurements; chosen by the shape if not given.
    """
    tokens, width = inputs.shape
    outputs = [member.outputs for member in members]
    chosen = choose_tiles(members, tokens, width) if tiles is None else tiles
    device = inputs.device
    out = torch.empty(tokens * sum(outputs), dtype=inputs.dtype, device=device)
    parts = torch.empty((chosen.splits, out.numel()), dtype=torch.float32, device=device) if chosen.splits > 1 else out
    with on_device(device):
        narrow = None if adapter is None else _narrow_sums(inputs, adapter.down, narrow_splits)
        launch = _four_bit if isinstance(members[0].weight, FourBit) else _gptq
        launch(inputs, members, adapter, narrow, out, parts, chosen)
    sizes = [tokens * size for size in outputs]
    return [part.view(tokens, size) for part, size in zip(out.split(sizes), outputs, strict=True)]


def choose_tiles(members: Sequence[Member], tokens: int, width: int) -> Tiles:
    """How to divide a product, so that there are about eight programs for each multiprocessor of a large GPU."""
    outputs, weight = sum(member.outputs for member in members), members[0].weight
    if isinstance(weight, Gptq):
        size = width if weight.group_size == -1 else weight.group_size
        depth, rows = min(16, (size & -size) // 8), 128 if tokens == 1 else 64
        return Tiles(rows, depth, _splits(outputs, rows, width // (8 * depth), 4), 4, 3)
    if tokens == 1:
        return Tiles(rows=8, depth=min(32, _power(width // BLOCK)), splits=1, warps=4, stages=1)
    return Tiles(64, 1, _splits(outputs, 64, width // BLOCK, 8), 4, 4)


def _splits(outputs: int, rows: int, steps: int, least: int) -> int:
    """Splits of `steps` steps, so that a large GPU is busy, and each split has `least` steps or more."""
    return max(1, min(1024 // -(-outputs // rows), steps // least, 16))


def _power(count: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (count - 1).bit_length()


def _tokens(count: int) -> int:
    """Tokens of a tile: one, or what tensor cores take."""
    return 1 if count == 1 else max(16, _power(count))


def _narrow_sums(inputs: torch.Tensor, down: torch.Tensor, splits: int | None) -> torch.Tensor:
    """Products with A, float32 [splits, tokens, sum of ranks], each over a part of the inputs."""
    from qdist.runtime.kernels import small_product_triton  # Triton is there only with a GPU

    tokens, width = inputs.shape
    ranks = down.shape[0]
    if splits is None:
        splits = max(1, min(16 if tokens <= 4 else 8, width // 256))
    narrow = torch.empty((splits, tokens, ranks), dtype=torch.float32, device=inputs.device)
    small_product_triton.narrow_sums[(-(-ranks // 16), splits)](
        inputs, down, narrow, tokens, width, ranks, TOKENS=max(16, _power(tokens)), RANKS=16, WIDTH=128, SPLITS=splits,
        num_warps=2, num_stages=3,
    )  # fmt: skip
    return narrow


def _three(values: Sequence[Any]) -> list[Any]:
    """Arguments of three members, of which the last stands for those that are not there."""
    return [*values, *[values[-1]] * (MOST_MEMBERS - len(values))]


def _shared(
    inputs: torch.Tensor, members: Sequence[Member], adapter: StackedAdapter | None, narrow: torch.Tensor | None
) -> tuple[list[Any], list[Any], list[int], list[int], dict[str, Any]]:
    """(B and biases, narrow sums and mask, outputs, ranks, constants), as both kernels take them."""
    ups = [inputs] if adapter is None else adapter.ups
    ranks = [0 if adapter is None else up.shape[1] for up in ups]
    nothing = [0] * (MOST_MEMBERS - len(members))
    mask = None if adapter is None else adapter.mask
    biases = [inputs if member.bias is None else member.bias for member in members]
    sums = [inputs if narrow is None else narrow, inputs if mask is None else mask.contiguous()]
    constants = {
        "THIN_SPLITS": 0 if narrow is None else narrow.shape[0], "MASKED": mask is not None,
        "BIASED": members[0].bias is not None, "TOKENS": _tokens(inputs.shape[0]),
        "RANKS": min(64, max(16, _power(max(ranks)))),
    }  # fmt: skip
    ranks = ranks + [0] * (len(members) - len(ranks))
    outputs = [member.outputs for member in members]
    return [*_three(ups), *_three(biases)], sums, outputs + nothing, ranks + nothing, constants


def _four_bit(
    inputs: torch.Tensor,
    members: Sequence[Member],
    adapter: StackedAdapter | None,
    narrow: torch.Tensor | None,
    out: torch.Tensor,
    parts: torch.Tensor,
    tiles: Tiles,
) -> None:
    from qdist.runtime.kernels import small_product_triton

    weights = [member.weight for member in members if isinstance(member.weight, FourBit)]
    matrices, sums, outputs, ranks, constants = _shared(inputs, members, adapter, narrow)
    nested = [(inputs, inputs) if weight.nested is None else weight.nested for weight in weights]
    device, kind = inputs.device, weights[0].quant_type
    count = sum(-(-size // tiles.rows) for size in outputs)
    small_product_triton.four_bit_product[(count, tiles.splits)](
        inputs, *_three([weight.packed.view(-1).view(torch.int32) for weight in weights]),
        *_three([weight.absmax for weight in weights]), *_three([pair[0] for pair in nested]),
        *_three([pair[1] for pair in nested]), *matrices, four_bit.absmax_code_book(device),
        rounded_book(kind, inputs.dtype, device), *table_words(kind, inputs.dtype), *sums, out, parts,
        counters(device), *inputs.shape, *outputs, *ranks, NESTED=weights[0].nested is not None,
        NESTED_BLOCK=NESTED_BLOCK, SPLITS=tiles.splits, ROWS=tiles.rows, BLOCKS=tiles.depth,
        PERMUTE=device.type != "cpu" and inputs.dtype != torch.float32, STAGES=tiles.stages, **constants,
        num_warps=tiles.warps,
    )  # fmt: skip


def _gptq(
    inputs: torch.Tensor,
    members: Sequence[Member],
    adapter: StackedAdapter | None,
    narrow: torch.Tensor | None,
    out: torch.Tensor,
    parts: torch.Tensor,
    tiles: Tiles,
) -> None:
    from qdist.runtime.kernels import small_product_triton

    weights = [member.weight for member in members if isinstance(member.weight, Gptq)]
    matrices, sums, outputs, ranks, constants = _shared(inputs, members, adapter, narrow)
    tokens, width = inputs.shape
    group_size = width if weights[0].group_size == -1 else weights[0].group_size
    count = sum(-(-size // tiles.rows) for size in outputs)
    small_product_triton.gptq_product[(count, tiles.splits)](
        inputs, *_three([weight.qweight for weight in weights]), *_three([weight.qzeros for weight in weights]),
        *_three([weight.scales for weight in weights]), *matrices, *sums, out, parts, counters(inputs.device), tokens,
        width, group_size, *outputs, *ranks, OFFSET=weights[0].offset, SPLITS=tiles.splits, ROWS=tiles.rows,
        WORDS=tiles.depth, STAGES=tiles.stages, **constants, num_warps=tiles.warps,
    )  # fmt: skip


@cache
def counters(device: torch.device) -> torch.Tensor:
    """Programs of each tile that have ended, int32; zero before and after every launch.

    One for a device: launches of several streams at a time would count in each other's.
    """
    return torch.zeros(_MOST_TILES, dtype=torch.int32, device=device)


@cache
def rounded_book(quant_type: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The 16 values of NF4 or FP4 in the dtype that they are multiplied in."""
    return four_bit.code_book(quant_type, device).to(dtype)


@cache
def table_words(quant_type: str, dtype: torch.dtype) -> tuple[int, ...]:
    """The same for byte permutations: four words of the values' low bytes, four of their high ones, as int32."""
    if dtype == torch.float32:
        return (0,) * 8
    book = rounded_book(quant_type, dtype, torch.device("cpu")).view(torch.uint8).view(16, 2)
    return tuple(book.t().contiguous().view(torch.int32).flatten().tolist())
