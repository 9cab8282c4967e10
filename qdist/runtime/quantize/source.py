"""Originals and packed folders: how a model folder is packed, and the 16-bit weights that a run came from."""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from qdist.core.errors import ModelError, RunError
from qdist.core.model.storage import Packing, quantized_as
from qdist.core.planning.plan import Source
from qdist.core.text import counted
from qdist.host.sources.cache import source_identity
from qdist.host.sources.model_folder import fingerprint, require_same_original
from qdist.host.sources.models import read_json
from qdist.runtime.formats.packed_folder import Manifest, read_manifest, tensor_files
from qdist.runtime.formats.packing import expert_suffixes
from qdist.runtime.quantize.blueprint import Blueprint, blueprint
from qdist.runtime.quantize.tensors import Tensors, outlines, require_layers, require_shapes, tensors_of


def check_packed(folder: Path, shape: Blueprint, packing: Packing) -> None:
    """Refuse a packed folder whose tensors differ from those that qdist would have written."""
    found = {name: tuple(part.shape) for name, part in outlines(folder, tensor_files(folder)).items()}
    wanted = {*shape.shapes} - shape.experts | _added(shape, packing)
    missing = sorted(wanted - set(found))
    if missing:
        raise ModelError(
            f"{folder} is packed to {packing}, but {len(missing)} of {len(wanted)} tensors are not where qdist "
            f"looks for them, such as {missing[0]}",
            try_="the model that it was made from",
        )
    for name in shape.linears:
        rows, columns = shape.packed_shape(name)
        half = -(-rows * columns // 2)  # two weights a byte, in a column
        if found[name] == (rows, columns) if packing.bits == 8 else math.prod(found[name]) == half:
            found[name] = shape.shapes[name]
    require_shapes(folder, shape, found)
    require_layers(folder, shape, found)


def _added(shape: Blueprint, packing: Packing) -> set[str]:
    """Names of tensors in a packed folder that the class has not."""
    ending = ".SCB" if packing.bits == 8 else f".weight.quant_state.bitsandbytes__{packing.type}"
    states = {f"{linear.removesuffix('.weight')}{ending}" for linear in shape.linears}
    return states | {name + suffix for name in shape.experts for suffix in expert_suffixes(packing)}


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
