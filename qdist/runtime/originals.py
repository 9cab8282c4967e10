"""The weights that a run's backbone was before it was quantized, read one at a time; or why they are not to be had."""

from pathlib import Path
from typing import NamedTuple

import torch

from qdist.core.errors import RunError
from qdist.core.plan import Source
from qdist.host.cached import source_identity
from qdist.host.fingerprints import fingerprint, require_same_original
from qdist.host.sources import read_json
from qdist.runtime.packed_folder import Manifest, read_manifest
from qdist.runtime.quantize_source import Blueprint, Tensors, blueprint, quantized_as, tensors_of


class Originals(NamedTuple):
    """A model folder in 16 or 32 bits, under the names of transformers' modules."""

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
