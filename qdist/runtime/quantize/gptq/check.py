"""Checks before anything starts that a folder is the GPTQ checkpoint it claims to be, naming what is wrong."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch

from qdist.core.errors import ModelError
from qdist.core.model.gptq import Gptq, Shape
from qdist.runtime.formats.packed_folder import opened, tensor_files
from qdist.runtime.kernels.gptq_bits import group_of_inputs, require_whole_words, unpack_zeros
from qdist.runtime.quantize.blueprint import Blueprint
from qdist.runtime.quantize.source import require_finite

_SCALES: dict[str, Literal["float16", "bfloat16", "float32"]] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_PLAIN = ("F16", "BF16", "F32")
_MERGE = "qdist merge the adapter again"
_REMEDY = "download the checkpoint again, or qdist quantize the model that it was made from"


class _Tensor(NamedTuple):
    file: str
    dtype: str
    shape: tuple[int, ...]


def checked(folder: Path, blueprint: Blueprint, gptq: Gptq) -> Gptq:
    """The settings plus what only the tensors tell: whether groups are ordered, the scales' dtype, bytes per layer.

    Every quantized linear must have its tensors in the shapes that its bits and groups ask for and every input's group
    must be one of those that there are; scales and what is not quantized must be finite numbers, and zeros those of
    the format.
    Raises ModelError naming the tensor.
    """
    tensors = _tensors(folder)
    ordered, kinds, stored = False, set(), set()
    layer_bytes: dict[int, int] = {}
    for path, inputs, outputs in _linears(blueprint):
        shape = gptq.of(path)
        if shape is None:
            _plain(folder, tensors, f"{path}.weight", (outputs, inputs))
            size = 2 * inputs * outputs
        else:
            size = _shapes(folder, tensors, path, shape, inputs, outputs)
            kinds.add(tensors[f"{path}.scales"].dtype)
            size += _offsets(folder, tensors, path, gptq, inputs, outputs)
            scattered, zeros = _contents(folder, tensors, path, shape, inputs, gptq)
            ordered |= scattered
            stored.add(zeros)
        index = blueprint.layer(f"{path}.weight")
        layer_bytes[index] = layer_bytes.get(index, 0) + size
    linears = {name.removesuffix(".weight") for name in blueprint.linears}
    for name, size_of in blueprint.shapes.items():
        path, _, leaf = name.rpartition(".")
        if path not in linears or leaf == "bias":
            _plain(folder, tensors, name, size_of)
    if len(kinds) > 1:
        raise ModelError(f"{folder} holds scales as {' and '.join(sorted(kinds))}", try_=_REMEDY)
    _check_format(folder, gptq, stored)
    return msgspec.structs.replace(
        gptq,
        desc_act=ordered,
        scales=_SCALES[kinds.pop()] if kinds else "float16",
        layer_bytes=max(layer_bytes.values()) if gptq.overrides else 0,
    )


def _tensors(folder: Path) -> dict[str, _Tensor]:
    found: dict[str, _Tensor] = {}
    files = tensor_files(folder)
    if not files:
        raise ModelError(f"{folder} holds no safetensors", try_="a GPTQ checkpoint in safetensors")
    for file in sorted(set(files.values())):
        with opened(folder / file) as handle:
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is not a dict)
                part = handle.get_slice(name)
                found[name] = _Tensor(file, part.get_dtype(), tuple(part.get_shape()))
    return found


def _linears(blueprint: Blueprint) -> Iterator[tuple[str, int, int]]:
    """(module path, inputs, outputs) of each linear that GPTQ quantizes."""
    for name in sorted(blueprint.linears):
        outputs, inputs = blueprint.shapes[name]
        yield name.removesuffix(".weight"), inputs, outputs


def _expect(
    folder: Path, tensors: dict[str, _Tensor], name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> _Tensor:
    there = tensors.get(name)
    if there is None:
        raise ModelError(f"{folder} has no tensor {name}", try_=_REMEDY)
    if there.shape != shape:
        raise ModelError(
            f"{folder}: {name} has shape {list(there.shape)}, and {list(shape)} is what the configuration asks for",
            try_="the right bits and group_size in config.json, or a whole checkpoint",
        )
    if there.dtype not in dtypes:
        raise ModelError(f"{folder}: {name} is stored as {there.dtype}, not {' or '.join(dtypes)}", try_=_REMEDY)
    return there


def _plain(folder: Path, tensors: dict[str, _Tensor], name: str, shape: tuple[int, ...]) -> None:
    """Check an unquantized tensor."""
    _expect(folder, tensors, name, shape, _PLAIN)
    require_finite(_read(folder, tensors, name), f"{folder}: {name}", try_=_REMEDY)


def _shapes(folder: Path, tensors: dict[str, _Tensor], path: str, shape: Shape, inputs: int, outputs: int) -> int:
    """Check the tensors of one linear; returns their bytes."""
    require_whole_words(f"{folder}: {path}", shape.bits, inputs=inputs, outputs=outputs)
    for name, size in shape.tensors(inputs, outputs).items():
        _expect(folder, tensors, f"{path}.{name}", size, _PLAIN if name == "scales" else ("I32",))
    if f"{path}.g_idx" in tensors:
        _expect(folder, tensors, f"{path}.g_idx", (inputs,), ("I32", "I64"))
    return shape.bytes_of(inputs, outputs)


def _offsets(folder: Path, tensors: dict[str, _Tensor], path: str, gptq: Gptq, inputs: int, outputs: int) -> int:
    """Check the offsets of one linear, if any; returns their bytes."""
    if gptq.offset is None or not gptq.offset.of(path):
        return 0
    size = gptq.offset.group_size
    if size < 1 or inputs % size:
        raise ModelError(f"{folder}: {path} has {inputs} inputs, which offsets of groups of {size} do not fit",
                         try_=_MERGE)  # fmt: skip
    name = f"{path}.weight_offset"
    stored = "F32" if gptq.offset.dtype == "float32" else "F16"
    _expect(folder, tensors, name, (inputs // size, outputs), (stored,))
    if not bool(torch.isfinite(_read(folder, tensors, name)).all()):
        raise ModelError(f"{folder}: {name} holds values that are no numbers", try_=_MERGE)
    return gptq.offset.bytes_of(inputs, outputs)


def _contents(
    folder: Path, tensors: dict[str, _Tensor], path: str, shape: Shape, inputs: int, gptq: Gptq
) -> tuple[bool, tuple[int, int, int]]:
    """(whether groups have scattered inputs, (bits, smallest and largest stored zero))."""
    scales = _read(folder, tensors, f"{path}.scales")
    if not bool(torch.isfinite(scales.float()).all()):
        count = int((~torch.isfinite(scales.float())).sum())
        raise ModelError(f"{folder}: {path}.scales holds {count} values that are no numbers", try_=_REMEDY)
    scattered = False
    if f"{path}.g_idx" in tensors:
        groups, g_idx = shape.groups(inputs), _read(folder, tensors, f"{path}.g_idx")
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            raise ModelError(
                f"{folder}: {path}.g_idx goes from {int(g_idx.min())} to {int(g_idx.max())}, and there are {groups} "
                "groups",
                try_=_REMEDY,
            )
        scattered = not torch.equal(g_idx.int(), group_of_inputs(inputs, shape.group_size))
    elif gptq.desc_act:
        raise ModelError(f"{folder} was quantized in activation order and has no {path}.g_idx", try_=_REMEDY)
    zeros = unpack_zeros(_read(folder, tensors, f"{path}.qzeros"), shape.bits, 0)
    return scattered, (shape.bits, int(zeros.min()), int(zeros.max()))


def _check_format(folder: Path, gptq: Gptq, stored: set[tuple[int, int, int]]) -> None:
    """Check that stored zeros fit the stated format. Symmetric ones are known: half of the range, or one less in v1.

    Others give themselves away in v1 alone, where the largest would stand for a zero outside of the range.
    """
    if not stored:
        return
    other = "gptq_v2" if gptq.format == "gptq" else "gptq"
    halves = all(low == high == (1 << (bits - 1)) - (other == "gptq") for bits, low, high in stored)
    beyond = gptq.format == "gptq" and any(high == (1 << bits) - 1 for bits, _, high in stored)
    if (gptq.sym and halves) or (not gptq.sym and beyond):
        raise ModelError(
            f"{folder} says that it is in the format {gptq.format}, and its zeros are those of {other}",
            try_=f'"checkpoint_format": "{other}" in its config.json and quantize_config.json',
        )


def _read(folder: Path, tensors: dict[str, _Tensor], name: str) -> torch.Tensor:
    with opened(folder / tensors[name].file) as handle:
        tensor: Any = handle.get_tensor(name)
    assert isinstance(tensor, torch.Tensor)
    return tensor
