"""A safetensors file that says in its header what it holds, so that a changed bit shows: adapters, tokens."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from qdist.core.errors import RunError
from qdist.core.quoting import command
from qdist.host.adapters import ADAPTER
from qdist.host.opening import read_object
from qdist.runtime.checksum import tensor_checksum
from qdist.runtime.packed_folder import opened

_SEAL, _CONFIG, ADAPTER_CONFIG = "sha256", "config_sha256", "adapter_config.json"
_WRITTEN_BY_ALL = "format"
"""What readers of safetensors want to find, whoever wrote it."""


def sealed(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file with these tensors, and a digest of both."""
    return {**metadata, _SEAL: _digest(tensors, metadata)}


def is_intact(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether a file holds what it says; True for one that says nothing, of an older qdist or of others.

    metadata: its own.
    """
    return _SEAL not in metadata or metadata[_SEAL] == _digest(tensors, metadata)


def config_seal(config: str) -> dict[str, str]:
    """What an adapter's file says of the adapter_config.json beside it, but for the base's name, which users change."""
    return _seal_of(json.loads(config))


def _seal_of(config: Mapping[str, object]) -> dict[str, str]:
    said = {key: value for key, value in config.items() if key != "base_model_name_or_path"}
    return {_CONFIG: hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def require_adapter(folder: Path, *, run: Path | None = None) -> None:
    """Raise RunError where an adapter folder is not as it was gathered. run: from whose checkpoints it can be again."""
    gather = command("gather", run or folder.parent)
    with opened(folder / ADAPTER) as handle:
        metadata: dict[str, str] = handle.metadata() or {}
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (a handle is no dict)
    if not is_intact(tensors, metadata):
        raise RunError(f"{folder / ADAPTER} does not hold the tensors that were gathered", try_=gather)
    found = _seal_of(read_object(folder / ADAPTER_CONFIG, RunError, try_=gather))
    if metadata.get(_CONFIG, found[_CONFIG]) != found[_CONFIG]:
        raise RunError(f"{folder / ADAPTER_CONFIG} does not say what was gathered", try_=gather)


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    said = sorted((key, value) for key, value in metadata.items() if key not in (_SEAL, _WRITTEN_BY_ALL))
    held = [(name, str(own.dtype), list(own.shape), tensor_checksum(own)) for name, own in sorted(tensors.items())]
    return hashlib.sha256(json.dumps([said, held]).encode()).hexdigest()
