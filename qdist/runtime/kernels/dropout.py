"""Thin products with dropout whose mask is never stored: a hash of seed, linear, token and input says what is kept.

Each token and each input has a hash of its own (two rounds of `mixed`); an element's is one more round over both.
Everything is int32 arithmetic that wraps, so that a CPU and a GPU draw the same mask to the bit. Values are not scaled
by 1 / (1 - p) here: callers put that into a factor which they apply anyway.
"""

import zlib
from functools import cache
from typing import Any, NamedTuple

import torch

from qdist.runtime.kernels.hashing import FIRST, SECOND, as_int32, mixed
from qdist.runtime.kernels.launching import on_device


class Mask(NamedTuple):
    """Which elements of a linear's input [tokens, in] dropout keeps."""

    seed: torch.Tensor
    """Of the micro-batch, int64 [1] on the input's device."""
    constant: int
    """Of the linear, 0 to 2**31 - 1."""
    share: float
    """Probability that an element is dropped."""

    @property
    def threshold(self) -> int:
        """An element is kept if its hash, an int32, is below."""
        return min(round((1.0 - self.share) * (1 << 32)), (1 << 32) - 1) - (1 << 31)


def constant_of(name: str) -> int:
    """A constant for `Mask`, made from the name of a linear, or of what several read together."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def kept(mask: Mask, tokens: int, width: int) -> torch.Tensor:
    """The mask written out, bool [tokens, width]: the reference of the kernels."""
    seed = mask.seed
    first = mixed(mixed(as_int32(seed)) ^ mask.constant)
    second = mixed(as_int32(seed >> 32) ^ first)
    token, column = (torch.arange(count, dtype=torch.int32, device=seed.device) for count in (tokens, width))
    rows = mixed(mixed(token ^ first) + second)
    columns = mixed(mixed(column ^ second) + first)
    value = (rows[:, None] ^ columns[None, :]).mul_(FIRST)  # in place: memory takes a CPU longer than arithmetic
    value.bitwise_xor_((value >> 15).bitwise_and_(0x1FFFF)).mul_(SECOND)
    return value < mask.threshold


def dropped(inputs: torch.Tensor, mask: Mask) -> torch.Tensor:
    """A copy of inputs [tokens, in] with zeros where they are dropped."""
    if inputs.is_cuda:
        return triton_dropped(inputs.contiguous(), mask)
    return inputs.masked_fill(~kept(mask, *inputs.shape), 0)


def dropped_product(inputs: torch.Tensor, down: torch.Tensor, mask: Mask) -> torch.Tensor:
    """`dropped(inputs) @ down'`, [tokens, r], for down [r, in]."""
    if inputs.is_cuda:
        return triton_product(inputs.contiguous(), down, mask)
    return dropped(inputs, mask) @ down.t()


def dropped_gradient(narrow: torch.Tensor, inputs: torch.Tensor, mask: Mask) -> torch.Tensor:
    """`narrow' @ dropped(inputs)`, float32 [r, in] (float64 of float64), for narrow [tokens, r]."""
    if inputs.is_cuda:
        return triton_gradient(narrow, inputs.contiguous(), mask)
    product = narrow.t() @ dropped(inputs, mask)
    return product.to(torch.promote_types(product.dtype, torch.float32))


def add_dropped(total: torch.Tensor, narrow: torch.Tensor, down: torch.Tensor, mask: Mask, alpha: float) -> None:
    """Add `alpha x narrow @ down`, zero where inputs are dropped, to total [tokens, in]; narrow [tokens, r]."""
    if total.is_cuda:
        triton_add(total, narrow, down, mask, alpha)
        return
    total.add_((narrow @ down).masked_fill_(~kept(mask, *total.shape), 0), alpha=alpha)


def triton_dropped(inputs: torch.Tensor, mask: Mask) -> torch.Tensor:
    """`dropped` of contiguous inputs."""
    out, (tokens, width) = torch.empty_like(inputs), inputs.shape
    with on_device(inputs.device):
        _kernels().copy_kept[(-(-tokens // 32), -(-width // 128))](
            inputs, mask.seed, out, tokens, width, mask.constant, mask.threshold, BM=32, BK=128, num_warps=4
        )
    return out


def triton_product(inputs: torch.Tensor, down: torch.Tensor, mask: Mask) -> torch.Tensor:
    """`dropped_product` of contiguous inputs."""
    (tokens, width), rank = inputs.shape, down.shape[0]
    parts = _in_parts(
        _kernels().product, inputs, down.contiguous(), mask, (tokens, width, rank), across=tokens, along=width,
        shape=(tokens, rank),
    )  # fmt: skip
    return parts.sum(0).to(inputs.dtype)


def triton_gradient(narrow: torch.Tensor, inputs: torch.Tensor, mask: Mask) -> torch.Tensor:
    """`dropped_gradient` of contiguous inputs."""
    (tokens, width), rank = inputs.shape, narrow.shape[1]
    parts = _in_parts(
        _kernels().gradient, narrow.contiguous(), inputs, mask, (tokens, width, rank), across=width, along=tokens,
        shape=(rank, width),
    )  # fmt: skip
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _in_parts(
    kernel: Any,
    left: torch.Tensor,
    right: torch.Tensor,
    mask: Mask,
    sizes: tuple[int, int, int],
    *,
    across: int,
    along: int,
    shape: tuple[int, int],
) -> torch.Tensor:
    """A thin product as float32 [parts, *shape] to be summed, so that there is work for the whole GPU.

    sizes: tokens, width and rank. across: rows or columns of the result beside the rank; along: what is summed over,
    of which each part has its share.
    """
    rank, device = sizes[2], left.device
    tile = _tile(rank, left.dtype)
    blocks = -(-across // _BLOCK), -(-rank // tile["R"])
    each = _split(along, blocks[0] * blocks[1])
    parts = torch.empty((-(-along // each), *shape), dtype=torch.float32, device=device)
    with on_device(device):
        kernel[(*blocks, len(parts))](
            left, right, mask.seed, parts, *sizes, mask.constant, mask.threshold, EACH=each, BM=_BLOCK, BK=_BLOCK,
            **tile,
        )  # fmt: skip
    return parts


def triton_add(total: torch.Tensor, narrow: torch.Tensor, down: torch.Tensor, mask: Mask, alpha: float) -> None:
    """`add_dropped` to a contiguous total."""
    (tokens, width), rank = total.shape, narrow.shape[1]
    with on_device(total.device):
        _kernels().add_kept[(-(-tokens // _BLOCK), -(-width // 128))](
            total, narrow.contiguous(), down.contiguous(), mask.seed, tokens, width, alpha, mask.constant,
            mask.threshold, RANK=rank, BM=_BLOCK, BK=128, R=min(64, _tile(rank, total.dtype)["R"]),
            PRECISION=_precision(total.dtype), num_warps=8,
        )  # fmt: skip


_BLOCK = 64
"""Tokens, and inputs, of a program."""
_PROGRAMS = 264
"""Programs wanted at least, two for each multiprocessor of an H100 or H200."""


def _tile(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of the thin products for a rank."""
    width = min(256, max(16, 1 << (rank - 1).bit_length()))
    return {
        "R": width,
        "PRECISION": _precision(dtype),
        "num_warps": 8 if width > 64 else 4,
        "num_stages": 3 if dtype.itemsize == 2 else 2,
    }


def _precision(dtype: torch.dtype) -> str:
    """How matrix units multiply: float32 without rounding to tf32, which other types know nothing of."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _split(length: int, programs: int) -> int:
    """Length of the parts, a multiple of `_BLOCK`, into which a sum is divided to fill a GPU."""
    blocks = -(-length // _BLOCK)
    wanted = max(1, min(_PROGRAMS // programs, blocks // 4))
    return -(-blocks // wanted) * _BLOCK


@cache
def _kernels() -> Any:
    """The kernels' module: Triton exists only with a GPU."""
    from qdist.runtime.kernels import dropout_triton

    return dropout_triton
