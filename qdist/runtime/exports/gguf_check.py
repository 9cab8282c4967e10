"""Reads a GGUF file back and compares each tensor with what it was made of, one at a time.

How far a weight may be off, where M is the tensor's largest magnitude, u = 2^-11 what fp16 rounds a number by, relative
to it, and t = 2^-25 half the distance of fp16's smallest numbers:

F32   as far as float32 is from what was made: 2^-24 M, which is 0 but for float64
F16   u M + t
Q8_0  half a step, (M / 127) / 2, and 127 times the rounding of the step d: u d + t. In all M / 254 + u M + 127 t
Q4_1  at most 15 times the rounding of the scale, if fp16 does not hold it, and the rounding of the minimum, taken from
      the scales and minimums themselves
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch

from qdist.core.errors import ModelError
from qdist.host.opening import told
from qdist.runtime.exports.gguf_blocks import Affine, Kind, Make, Stored, Type, dense, made, rows_of
from qdist.runtime.exports.gguf_names import facts_of, stored_tensors
from qdist.runtime.exports.gguf_rope import rope_of

_U, _T, _FLOAT = 2.0**-11, 2.0**-25, 2.0**-24
_ARITHMETIC = 1e-6
"""What float32 itself adds, relative to M or a bound, when weights are computed for the comparison."""


def check_gguf(
    out: Path, tensors: Mapping[str, tuple[tuple[int, ...], Make]], *, config: Mapping[str, Any], kind: Kind
) -> float:
    """The largest error of any weight, relative to the largest magnitude in its tensor.

    Arguments as `write_gguf` was given them. The file is mapped, and each tensor is made once more.
    Raises ModelError where a tensor is missing, of another shape or type, or further off than its type rounds to.
    """
    facts, rope = facts_of(config, name=out.name), rope_of(config, name=out.name)
    stored = stored_tensors(tensors, facts, rope, kind)
    with told(f"{out} is no whole GGUF file", ModelError, try_="export it again"):
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    odd = sorted(found.keys() ^ {tensor.name for tensor in stored})
    if odd:
        raise ModelError(f"{out} and the model differ in {odd[0]}", try_="export it again")
    return max((_error(tensor, found[tensor.name], out) for tensor in stored), default=0.0)


def _error(tensor: Stored, found: Any, out: Path) -> float:
    """The largest error of a tensor, relative to its largest magnitude."""
    if found.tensor_type != tensor.type or tuple(reversed(found.shape.tolist())) != tensor.shape:
        shape = list(reversed(found.shape.tolist()))
        raise ModelError(
            f"{out} has {tensor.name} as {found.tensor_type.name} {shape}, not {tensor.type.name} {list(tensor.shape)}",
            try_="export it again",
        )
    value = made(tensor)
    furthest = largest = 0.0
    for rows in rows_of(tensor, value):
        read = torch.from_numpy(gguf.quants.dequantize(found.data[rows.start : rows.stop], found.tensor_type).copy())
        asked = dense(rows.part) if isinstance(rows.part, Affine) else rows.part.to(torch.float32)
        largest = max(largest, float(asked.abs().max()))
        difference = float((read - asked).abs().max())
        if difference != difference:
            raise ModelError(f"{out} has numbers in {tensor.name} that are not finite", try_="export it again")
        furthest = max(furthest, difference)
    _require_within(tensor, furthest, _bound(tensor, value, largest), largest, out)
    return furthest / largest if largest else 0.0


def _require_within(tensor: Stored, furthest: float, bound: float, largest: float, out: Path) -> None:
    allowed = bound * (1 + 1e-5) + _ARITHMETIC * largest
    if furthest > allowed:
        raise ModelError(
            f"{out} has {tensor.source} off by {furthest:.3g}, and {tensor.type.name} rounds by {allowed:.3g} at most",
            try_="export it again",
        )


def _bound(tensor: Stored, value: torch.Tensor | Affine, largest: float) -> float:
    """How far any weight may be off: see the head of this file."""
    if tensor.type == Type.F32:
        return _FLOAT * largest
    if tensor.type == Type.F16:
        return _U * largest + _T
    if tensor.type == Type.Q8_0:
        return largest / 254 + _U * largest + 127 * _T
    assert isinstance(value, Affine)
    return 15 * _rounding(value.scales) + _rounding(value.minimums)


def _rounding(numbers: torch.Tensor) -> float:
    """What fp16 changes of them, the most."""
    return float((numbers.to(torch.float16).to(torch.float32) - numbers.to(torch.float32)).abs().max())
