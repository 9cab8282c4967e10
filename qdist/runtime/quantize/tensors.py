"""A model folder's tensors under the names of transformers' class, read one at a time."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from qdist.core.errors import ModelError
from qdist.core.text import counted, format_bytes
from qdist.host.opening import told
from qdist.host.terminal import say
from qdist.runtime.formats.checksum import require_sums
from qdist.runtime.formats.packed_folder import opened, tensor_files
from qdist.runtime.formats.recorded_sums import stated_sums
from qdist.runtime.model.classes import class_of
from qdist.runtime.quantize.blueprint import Blueprint
from qdist.runtime.quantize.stored_names import Recipe, reading

_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "I64": torch.int64,
    "I32": torch.int32, "BOOL": torch.bool, "F64": torch.float64,
}  # fmt: skip
_READABLE = (torch.float32, torch.float16, torch.bfloat16)
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "ffn_dim", "max_position_embeddings")
"""Keys of config.json that directly give a tensor's rows or columns."""


class Tensors(Protocol):
    """A model's weights in 16 or 32 bits, by module names."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is read in."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU; its memory is freed when it is dropped.

        Raises ModelError if the folder says that it held another.
        """

    def matrices(self, name: str) -> Iterator[torch.Tensor]:
        """The matrices of a 3-D parameter in order, one expert's in memory at a time where they are stored so."""

    def matrix_of(self, name: str) -> Callable[[int], torch.Tensor]:
        """What reads any one of them. Where they are stored together it keeps them all until it is dropped."""


class StreamedTensors:
    """Safetensors, read through mmap; nothing is kept."""

    def __init__(self, folder: Path, shape: Blueprint) -> None:
        """Reads names and sizes of the folder's tensors, and finds which of them make each of the class's."""
        self._folder, self._sums, self._shape = folder, stated_sums(folder), shape
        self._files = tensor_files(folder)
        self._outlines = outlines(folder, self._files)
        self._recipes = reading(shape.model, self._files, extra=shape.shapes, fp8=shape.fp8)
        self._found = dict[str, tuple[Recipe, torch.Tensor]]()
        with told(str(folder), ModelError, try_="the config.json that came with these weights"):
            for name, recipe, made in self._recipes.outlines(self._outlines.__getitem__):
                self._found[name] = recipe, made

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that can be read."""
        return {name: tuple(made.shape) for name, (_, made) in self._found.items()}

    @property
    def unused(self) -> Collection[str]:
        """What transformers would call the stored tensors that the class has no use for."""
        return self._recipes.unused

    @property
    def canonical(self) -> bool:
        """Whether every tensor is stored under its module's name."""
        return all(recipe.sources == (name,) for name, (recipe, _) in self._found.items())

    def dtype(self, name: str) -> torch.dtype:
        found = self._found[name][1].dtype
        if found not in _READABLE and name not in self._shape.mxfp4 and found.is_floating_point:
            kind = str(found).removeprefix("torch.")
            raise ModelError(
                f"{self._folder}: {name} is stored as {kind}, not in 16 or 32 bits",
                try_="the model that it was made from",
            )
        return found

    def read(self, name: str) -> torch.Tensor:
        return self._make(name, None)

    def matrices(self, name: str) -> Iterator[torch.Tensor]:
        yield from map(self.matrix_of(name), range(self.shapes[name][0]))

    def matrix_of(self, name: str) -> Callable[[int], torch.Tensor]:
        if self._is_by_expert(name):
            return lambda expert: self._make(name, expert)[0]
        return self.read(name).__getitem__

    def _is_by_expert(self, name: str) -> bool:
        """Whether the parameter's first axis is a list of stored tensors, so that one matrix can be made alone."""
        recipe, whole = self._found[name]
        if recipe.converter is None or {len(names) for names in recipe.parts.values()} != {whole.shape[0]}:
            return False
        values = {pattern: [self._outlines[key] for key in names] for pattern, names in recipe.take(0).items()}
        return tuple(self._recipes.make(recipe, values)[name].shape) == (1, *whole.shape[1:])

    def _make(self, name: str, expert: int | None) -> torch.Tensor:
        recipe = self._found[name][0]
        values = {pattern: [self._stored(key) for key in names] for pattern, names in recipe.take(expert).items()}
        return self._recipes.make(recipe, values)[name]

    def _stored(self, key: str) -> torch.Tensor:
        # Opened anew each time: the pages of a mapping that stays open count as memory of this process.
        file = self._folder / self._files[key]
        with opened(file) as handle:
            return require_sums(file, key, handle.get_tensor(key), self._sums)


def outlines(folder: Path, files: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """A meta tensor for each stored one. Raises ModelError for a kind of number that torch does not have."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(set(files.values())):
        with opened(folder / file) as handle:
            for name in (name for name, where in files.items() if where == file):
                part = handle.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ModelError(f"{folder}: {name} is stored as {part.get_dtype()}", try_="a 16-bit model")
                found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return found


class LoadedTensors:
    """A model that transformers loaded whole: `.bin` files, or tensors that only transformers makes."""

    def __init__(self, folder: Path, shape: Blueprint) -> None:
        size = sum(file.stat().st_size for pattern in ("*.bin", "*.safetensors") for file in folder.glob(pattern))
        say(f"{folder} is loaded whole by transformers: {format_bytes(size)} of host memory", err=True)
        with told(str(folder), ModelError, try_="a folder with config.json and *.safetensors"):
            model, loading = class_of(shape.config).from_pretrained(
                folder,
                dtype="auto",
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
            )
        require_shapes(folder, shape, {name: tuple(there) for name, there, _ in loading["mismatched_keys"]})
        names = set(shape.shapes)
        missing = sorted(set(loading["missing_keys"]) & names)
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of {len(names)} tensors, such as {missing[0]}",
                try_="download the model again",
            )
        self._values: dict[str, torch.Tensor] = model.state_dict()

    def dtype(self, name: str) -> torch.dtype:
        return self._values[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self._values[name]

    def matrices(self, name: str) -> Iterator[torch.Tensor]:
        yield from self._values[name]

    def matrix_of(self, name: str) -> Callable[[int], torch.Tensor]:
        return self._values[name].__getitem__


def streamed(folder: Path, shape: Blueprint) -> StreamedTensors | None:
    """The folder's tensors, if it has what makes each tensor of the model; else None.

    Raises ModelError if one is not of the size that config.json gives it, or a layer is left over.
    """
    if not tensor_files(folder):
        return None
    tensors = StreamedTensors(folder, shape)
    found = tensors.shapes
    require_shapes(folder, shape, found)
    if not set(shape.shapes) <= set(found):
        return None
    require_layers(folder, shape, tensors.unused)
    return tensors


def tensors_of(folder: Path, shape: Blueprint) -> Tensors:
    """The folder's tensors, streamed if possible, else through transformers."""
    return streamed(folder, shape) or LoadedTensors(folder, shape)


class StoredModel:
    """A folder in 16 bits, in whatever layout it is stored, as the weights that fill a model."""

    def __init__(self, folder: Path, shape: Blueprint) -> None:
        """Raises ModelError as `tensors_of` does."""
        self._tensors, self._shape = tensors_of(folder, shape), shape
        self._names: dict[str, list[str]] = {}
        """Names of the tensors of each module, by its path."""
        for name in shape.shapes:
            self._names.setdefault(name.rpartition(".")[0], []).append(name)

    def of(self, path: str, module: nn.Module) -> Mapping[str, torch.Tensor]:
        return {name.rpartition(".")[2]: self._read(name) for name in self._names.get(path, ())}

    def check(self) -> None:
        """Nothing to check: each tensor is verified as it is read."""

    def _read(self, name: str) -> torch.Tensor:
        value = self._tensors.read(name)
        return value.t().contiguous() if name in self._shape.transposed else value


def require_shapes(folder: Path, shape: Blueprint, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelError for a tensor whose size differs from config.json's. found: sizes in the files."""
    for name, wanted in shape.shapes.items():
        if name in found and found[name] != wanted:
            raise ModelError(
                f"{folder}: {_contradiction(shape.config.to_dict(), name, wanted, found[name])}",
                try_="the config.json that came with these weights",
            )


def _contradiction(config: Mapping[str, object], name: str, wanted: tuple[int, ...], found: tuple[int, ...]) -> str:
    """The config.json key that alone explains a differing size, if there is one."""
    axes = [axis for axis, sizes in enumerate(zip(wanted, found, strict=False)) if sizes[0] != sizes[1]]
    keys = [key for key in _SIZES if axes and config.get(key) == wanted[axes[0]]]
    if len(wanted) == len(found) and len(axes) == len(keys) == 1:
        what = ("values" if len(found) == 1 else "rows", "columns")[axes[0]]
        return f"config.json says {keys[0]} {wanted[axes[0]]}, {name} has {found[axes[0]]} {what}"
    return f"config.json makes {name} {list(wanted)} in size, the file holds {list(found)}"


def require_layers(folder: Path, shape: Blueprint, names: Collection[str]) -> None:
    """Raise ModelError if the files hold more decoder layers than config.json counts: the rest would be ignored.

    Layers that the class itself leaves out, which predict several tokens ahead, are none of them.
    names: what transformers would call the stored tensors that the class has no use for.
    """
    left_out = ignored_by(shape.model)
    numbered = re.compile(rf"{re.escape(shape.stack)}\.(\d+)\.")
    own = (name for name in names if not any(re.search(pattern, name) for pattern in left_out))
    most = max((int(found[1]) + 1 for name in own if (found := numbered.match(name))), default=0)
    if most > shape.layers:
        raise ModelError(
            f"{folder}: config.json says {counted(shape.layers, 'layer')}, the files hold {most}",
            try_="the config.json that came with these weights",
        )


def ignored_by(model: Any) -> tuple[str, ...]:
    """Patterns of stored names that a class says it has no use for."""
    return tuple(model._keys_to_ignore_on_load_unexpected or ())
