"""Encodes a tensor for a GGUF file as float32, float16, Q8_0, Q4_1 or as llama.cpp rounds it, a few rows at a time.

Blocks are those of ggml (ggml-common.h): Q8_0 is fp16 d and 32 int8, Q4_1 is fp16 d, fp16 m and 16 bytes of nibbles.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch

from qdist.core.errors import ModelError
from qdist.core.model.storage import GgufType
from qdist.runtime.exports.gguf.quantizer import ROUNDED_BY_LLAMA_CPP, quantize

Kind = GgufType
"""Type of most tensors in a file; norms and biases are float32 in all of them."""
Type = gguf.GGMLQuantizationType
BLOCK = 32
"""Weights per block, in both Q8_0 and Q4_1."""
LARGEST = 65504.0
"""Largest finite fp16 value."""
_CHUNK = 1 << 22
"""Weights converted at once: 16 MiB in float32."""


class Affine(NamedTuple):
    """A linear whose weights are scale x value + minimum within groups of consecutive inputs."""

    values: torch.Tensor
    """uint8 [out, in], 0 to 15."""
    scales: torch.Tensor
    """Float [groups, out]."""
    minimums: torch.Tensor
    """float32 [groups, out]: the weight that a value of 0 represents."""
    group_size: int
    """Inputs per group: a multiple of 32, or the whole input width if there is one group."""


Make = Callable[[], torch.Tensor | Affine]
"""Creates a tensor when it is needed."""


class Stored(NamedTuple):
    """One tensor of a file."""

    name: str
    """Its name in the file."""
    source: str
    """Its name in transformers."""
    shape: tuple[int, ...]
    type: Any
    """A `gguf.GGMLQuantizationType`."""
    heads: int
    """Number of heads whose two halves of rows are interleaved; 0 leaves the rows as they are."""
    make: Make

    @property
    def bytes(self) -> int:
        """Bytes in the file, without padding to the next tensor."""
        weights, size = gguf.GGML_QUANT_SIZES[self.type]
        count = 1
        for length in self.shape:
            count *= length
        return count // weights * size


class Rows(NamedTuple):
    """Some rows of a tensor, in file order."""

    start: int
    stop: int
    part: torch.Tensor | Affine


def made(stored: Stored) -> torch.Tensor | Affine:
    """The tensor, on the CPU. Raises ModelError if it differs from its description."""
    value = stored.make()
    if isinstance(value, Affine):
        value = value._replace(
            values=value.values.cpu(), scales=value.scales.detach().cpu(), minimums=value.minimums.detach().cpu()
        )
        _require_affine(stored, value)
        return value
    if stored.type == Type.Q4_1:
        raise ModelError(
            f"{stored.source} is {value.dtype}, and Q4_1 takes a linear of 4-bit values", try_="f16 or q8_0"
        )
    _require_shape(stored, value)
    return value.detach().cpu()


def _require_affine(stored: Stored, value: Affine) -> None:
    _require_shape(stored, value.values)
    out, inputs = value.values.shape
    size = value.group_size
    if size < BLOCK or size % BLOCK or inputs % BLOCK:
        raise ModelError(
            f"{stored.source} has groups of {size} of {inputs} inputs, and Q4_1 scales {BLOCK} at a time",
            try_="f16, or a group size that is a multiple of 32",
        )
    groups = -(-inputs // size)
    for what, numbers in (("scales", value.scales), ("minimums", value.minimums)):
        if tuple(numbers.shape) != (groups, out):
            raise ModelError(f"{stored.source} has {what} {list(numbers.shape)}, not {[groups, out]}")
    if value.values.numel() and int(value.values.max()) > 15:
        raise ModelError(f"{stored.source} has a value of {int(value.values.max())}, and 4 bits end at 15", try_="q8_0")


def _require_shape(stored: Stored, value: torch.Tensor) -> None:
    if tuple(value.shape) != stored.shape:
        raise ModelError(f"{stored.source} has shape {list(value.shape)}, not {list(stored.shape)}")


def rows_of(stored: Stored, value: torch.Tensor | Affine) -> Iterator[Rows]:
    """The tensor's rows in file order, a chunk at a time."""
    count = stored.shape[0]
    width = stored.shape[1] if len(stored.shape) > 1 else 1
    order = row_order(count, stored.heads)
    step = max(1, _CHUNK // width)
    for start in range(0, count, step):
        rows = order[start : start + step]
        if isinstance(value, Affine):
            part: torch.Tensor | Affine = Affine(
                value.values[rows], value.scales[:, rows], value.minimums[:, rows], value.group_size
            )
        else:
            part = value[rows]
        yield Rows(start, start + len(rows), part)


def row_order(count: int, heads: int) -> torch.Tensor:
    """Row of transformers' matrix for each row of the file, int64 [count].

    Llama's queries and keys are rotated in pairs: transformers pairs row i of a head with row i + head_dim / 2, ggml
    with its neighbour. So each head's halves alternate in the file.
    """
    rows = torch.arange(count)
    return rows.reshape(heads, 2, -1).transpose(1, 2).reshape(-1) if heads else rows


def encoded(stored: Stored, part: torch.Tensor | Affine) -> np.ndarray[Any, Any]:
    """Rows encoded for the file. Raises ModelError if they exceed fp16."""
    if isinstance(part, Affine):
        if stored.type == Type.Q4_1:
            return _q4_1(stored.source, part)
        part = dense(part)
    if stored.type == Type.F16:
        return _half(stored.source, part).numpy()
    wide = _finite(stored.source, part.to(torch.float32), part)
    if stored.type == Type.F32:
        return wide.numpy()
    if wide.numel() and float(wide.abs().max()) > 127 * LARGEST:
        raise _too_large(stored.source, wide)
    if stored.type in ROUNDED_BY_LLAMA_CPP:
        return quantize(wide.numpy(), stored.type)
    with np.errstate(over="ignore", invalid="ignore"):  # 1 / d of blocks below 1e-36, whose d is 0 in fp16
        blocks: np.ndarray[Any, Any] = gguf.quants.quantize(wide.numpy(), stored.type)
    return blocks


def dense(part: Affine) -> torch.Tensor:
    """Dense weights, float32 [out, in]."""
    group = torch.arange(part.values.shape[1]) // part.group_size
    weights = part.values.to(torch.float32)
    weights *= part.scales.to(torch.float32).t()[:, group]
    return weights.add_(part.minimums.to(torch.float32).t()[:, group])


def _q4_1(source: str, part: Affine) -> np.ndarray[Any, Any]:
    """uint8 [out, in / 32 x 20]. Element i of a block is the low nibble of byte i, element i + 16 the high one."""
    out, inputs = part.values.shape
    pairs = part.values.reshape(out, -1, 2, BLOCK // 2)
    nibbles = pairs[:, :, 0] | (pairs[:, :, 1] << 4)
    group = torch.arange(0, inputs, BLOCK) // part.group_size
    numbers = [
        _half(source, number).t()[:, group].contiguous().unsqueeze(-1).view(torch.uint8)
        for number in (part.scales, part.minimums)
    ]
    return torch.cat([*numbers, nibbles], dim=-1).reshape(out, -1).numpy()


def _half(source: str, value: torch.Tensor) -> torch.Tensor:
    return _finite(source, value.to(torch.float16), value)


def _finite(source: str, value: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(value).all()):
        raise _too_large(source, before)
    return value


def _too_large(source: str, value: torch.Tensor) -> ModelError:
    wide = value.to(torch.float32)
    if not bool(torch.isfinite(wide).all()):
        return ModelError(f"{source} has numbers that are not finite", try_="an earlier checkpoint of the run")
    return ModelError(
        f"{source} reaches {float(wide.abs().max()):.6g}, and fp16 ends at {LARGEST:g}",
        try_="the merged model in bfloat16",
    )
