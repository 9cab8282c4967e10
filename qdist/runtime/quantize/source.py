"""Source of packing: a folder's tensors under transformers' module names, read one at a time and checked finite."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from qdist.core.errors import ModelError, RunError
from qdist.core.model.families import FAMILIES
from qdist.core.model.gptq import method_of
from qdist.core.model.storage import Packing
from qdist.core.planning.plan import Source
from qdist.core.text import counted
from qdist.host.opening import told
from qdist.host.sources.cache import source_identity
from qdist.host.sources.model_folder import fingerprint, require_same_original
from qdist.host.sources.models import read_json
from qdist.runtime.formats.packed_folder import Manifest, opened, read_manifest, read_tensor, tensor_files
from qdist.runtime.formats.recorded_sums import stated_sums
from qdist.runtime.model.classes import empty_model
from qdist.runtime.model.describe import facts_of
from qdist.runtime.model.skeleton import open_config, refused

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "ffn_dim", "max_position_embeddings")
"""Keys of config.json that directly give a tensor's rows or columns."""
_LAYER = re.compile(r"\.(\d+)\.")


class Blueprint(NamedTuple):
    """A model's tensors as named by transformers' class, without their values."""

    config: Any
    architecture: str
    prefix: str
    """Prefix of the backbone's module names; older files leave it out."""
    layers: int
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter and stored buffer by name; a tied one is listed once."""
    linears: frozenset[str]
    """Names of the weights to pack: the linears of decoder layers."""
    skipped: tuple[str, ...] | None
    """Linears that transformers must be told not to pack; None if it skips them by itself."""

    def layer(self, name: str) -> int:
        """The decoder layer of a tensor; `layers` for anything outside."""
        found = _LAYER.search(name)
        return int(found[1]) if found else self.layers


class Tensors(Protocol):
    """A model's weights in 16 or 32 bits, by module names."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU; its memory is freed when it is dropped.

        Raises ModelError if the folder says that it held another.
        """


def blueprint(folder: Path) -> Blueprint:
    """The blueprint of a model folder. Raises ModelError for a family that qdist does not know."""
    config = open_config(folder)
    facts = facts_of(config, name=str(folder))
    with refused(folder):
        model = empty_model(config)
    tied = set(model.all_tied_weights_keys)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    packed = [path for path in paths if facts.packs(path)]
    head = [path for path in paths if model.get_submodule(path) is model.get_output_embeddings()]
    left = [path for path in paths if path not in packed]
    linears = frozenset(f"{path}.weight" for path in packed)
    expected = sum(run.count * len(run.shape.linears) for run in facts.layers)
    if len(linears) != expected:
        raise ModelError(
            f"{folder} has {len(linears)} linears in {facts.layer_count} decoder layers, not {expected}",
            try_="qdist doctor: transformers may be of another version",
        )
    skipped = tuple(left) if set(left) - set(head) else None
    return Blueprint(
        config, type(model).__name__, str(model.base_model_prefix), facts.layer_count, shapes, linears, skipped
    )


class StreamedTensors:
    """Safetensors, read through mmap; nothing is kept."""

    def __init__(self, folder: Path, stored: Mapping[str, tuple[str, str]]) -> None:
        """stored: the file of each of the model's tensors, and its name in that file."""
        self._folder, self._stored, self._sums = folder, stored, stated_sums(folder)
        self._dtypes: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted({file for file, _ in stored.values()}):
            with opened(folder / file) as handle:
                for name, (where, there) in stored.items():
                    if where == file:
                        part = handle.get_slice(there)
                        self._dtypes[name], self.shapes[name] = part.get_dtype(), tuple(part.get_shape())

    @property
    def canonical(self) -> bool:
        """Whether every tensor is stored under its module's name."""
        return all(name == there for name, (_, there) in self._stored.items())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._dtypes[name]
        if stored not in _DTYPES:
            raise ModelError(
                f"{self._folder}: {name} is stored as {stored}, not in 16 or 32 bits",
                try_="the model that it was made from",
            )
        return _DTYPES[stored]

    def read(self, name: str) -> torch.Tensor:
        file, there = self._stored[name]
        return read_tensor(self._folder / file, there, self._sums)


class LoadedTensors:
    """A model that transformers loaded whole: `.bin` files, or names that only transformers maps."""

    def __init__(self, folder: Path, shape: Blueprint) -> None:
        from transformers import AutoModelForCausalLM

        with told(str(folder), ModelError, try_="a folder with config.json and *.safetensors"):
            model, loading = AutoModelForCausalLM.from_pretrained(
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


def streamed(folder: Path, shape: Blueprint) -> StreamedTensors | None:
    """The folder's tensors, if it has one for each tensor of the model; else None.

    Raises ModelError if one is not of the size that config.json gives it, or a layer is left over.
    """
    files = tensor_files(folder)
    stored: dict[str, tuple[str, str]] = {}
    old_names = FAMILIES[shape.config.model_type].old_names
    for name in shape.shapes:
        names = (name, name.removeprefix(f"{shape.prefix}."), old_names.get(name, name))
        there = next((candidate for candidate in names if candidate in files), None)
        if there is None:
            return None
        stored[name] = (files[there], there)
    tensors = StreamedTensors(folder, stored)
    require_shapes(folder, shape, tensors.shapes)
    _require_layers(folder, shape, files)
    return tensors


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


def _require_layers(folder: Path, shape: Blueprint, files: Collection[str]) -> None:
    """Raise ModelError if the files hold more decoder layers than config.json counts: the rest would be ignored."""
    most = max((int(found[1]) + 1 for name in files if (found := _LAYER.search(name))), default=0)
    if most > shape.layers:
        raise ModelError(
            f"{folder}: config.json says {counted(shape.layers, 'layer')}, the files hold {most}",
            try_="the config.json that came with these weights",
        )


def tensors_of(folder: Path, shape: Blueprint) -> Tensors:
    """The folder's tensors, streamed if possible, else through transformers."""
    return streamed(folder, shape) or LoadedTensors(folder, shape)


def quantized_as(config: Mapping[str, Any], *, name: str) -> Packing | None:
    """How a model is already packed, from its config.json; None if it is not.

    Raises ModelError for a packing that is not bitsandbytes'.
    """
    stored = config.get("quantization_config")
    if not stored:
        return None
    method = method_of(stored) or "bitsandbytes"
    if method != "bitsandbytes":
        raise ModelError(f"{name} is quantized with {method}, which qdist does not read yet", try_="a 16-bit model")
    if stored.get("load_in_8bit"):
        return Packing(bits=8)
    kind, storage = stored.get("bnb_4bit_quant_type", "fp4"), stored.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise ModelError(f"{name} stores its packed weights as {storage}, not uint8", try_="a 16-bit model")
    return Packing(bits=4, type=kind, double=bool(stored.get("bnb_4bit_use_double_quant")))


def check_packed(folder: Path, shape: Blueprint, packing: Packing) -> None:
    """Refuse a packed folder whose tensors differ from those that qdist would have written."""
    names = set(tensor_files(folder))
    ending = ".SCB" if packing.bits == 8 else f".weight.quant_state.bitsandbytes__{packing.type}"
    wanted = {*shape.shapes, *(f"{linear.removesuffix('.weight')}{ending}" for linear in shape.linears)}
    missing = sorted(wanted - names)
    if missing:
        raise ModelError(
            f"{folder} is packed to {packing}, but {len(missing)} of {len(wanted)} tensors are not where qdist "
            f"looks for them, such as {missing[0]}",
            try_="the model that it was made from",
        )
    files = tensor_files(folder)
    found = StreamedTensors(folder, {name: (files[name], name) for name in shape.shapes}).shapes
    if packing.bits == 4:  # two weights a byte, in a column
        for name in shape.linears:
            whole = shape.shapes[name]
            found[name] = whole if math.prod(found[name]) == -(-math.prod(whole) // 2) else found[name]
    require_shapes(folder, shape, found)
    _require_layers(folder, shape, files)


class Originals(NamedTuple):
    """A model folder in 16 or 32 bits, under transformers' module names."""

    folder: Path
    shape: Blueprint
    tensors: Tensors

    def read(self, name: str, quantized: torch.Tensor) -> torch.Tensor:
        """A parameter in float32, on the CPU.

        quantized: the run's own, from which rows come that were added to a vocabulary.
        """
        value = self.tensors.read(name).float()
        added = 0 if name in self.shape.linears else quantized.shape[0] - value.shape[0]
        return torch.cat([value, quantized.detach()[-added:].to("cpu", torch.float32)]) if added > 0 else value


def find_originals(source: Source) -> Originals | str:
    """The original weights of a run, or why there are none to merge onto."""
    if source.kind == "dummy":
        return "random weights have no original to merge onto"
    folder = Path(source.path)
    if source.gptq:
        return f"{folder} is a GPTQ checkpoint, which does not say which model it was made from"
    if not folder.is_dir():
        return f"{folder}, which the run was trained on, is gone"
    try:
        require_same_original(source, run="the run")
    except RunError as error:
        return error.message
    shape = blueprint(folder)
    if not _is_packed(folder):
        return Originals(folder, shape, tensors_of(folder, shape))
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{folder} is quantized itself, and does not say which model it was made from"
    origin = Path(manifest.source)
    if not origin.is_dir():
        return f"{folder} was made from {origin}, which is not there any more"
    if not _is_origin(origin, manifest):
        return f"{folder} was made from {origin}, whose files have changed since"
    shape = blueprint(origin)
    return Originals(origin, shape, tensors_of(origin, shape))


def _is_origin(folder: Path, manifest: Manifest) -> bool:
    """Whether a folder still holds what another was packed from."""
    if manifest.source_fingerprint:
        return fingerprint(folder) == manifest.source_fingerprint
    return source_identity(folder, manifest.packing) == manifest.source_identity


def _is_packed(folder: Path) -> bool:
    config = read_json(folder / "config.json")
    return quantized_as(config, name=str(folder)) is not None


def is_finite(value: torch.Tensor) -> bool:
    """False for NaN or infinity anywhere. `isfinite` of a whole table takes seven times as long, and makes copies."""
    if not value.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())


def require_finite(value: torch.Tensor, name: str, *, try_: str = "download the model again") -> torch.Tensor:
    """The tensor itself. Raises ModelError if it cannot be packed, with the count of its non-finite values."""
    if value.is_floating_point() and not is_finite(value):
        bad = int((~torch.isfinite(value)).sum())
        raise ModelError(
            f"{name} holds NaN or infinite numbers: {counted(bad, 'value')} of {value.numel():,}",
            try_=try_,
        )
    return value
