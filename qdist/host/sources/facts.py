"""Which facts are there of a model's configuration? A known family's, or what a child process read from its class."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from qdist.core.errors import JobError, MachineError, ModelError
from qdist.core.model.families import FAMILIES, from_config
from qdist.core.model.shapes import ModelFacts
from qdist.core.requests import Describe
from qdist.host.files import cache_dir, cache_path, write_atomic
from qdist.host.opening import read_typed
from qdist.host.tasks import ask

_DESCRIPTION = 4
"""Increment whenever the same class would be described differently."""
_FOLDER = "facts"


def facts_of(config: Mapping[str, Any], *, name: str, code: str = "") -> ModelFacts:
    """Facts from the content of a config.json, without torch where its family is known.

    Those of another model are read from transformers' class by a child process, once: the cache keeps them.
    code: folder of the model's own code, if that may be run to define the class.
    Raises ModelError for a model that transformers has no class for, or that is no causal language model.
    """
    if is_known(config):
        return from_config(config, name=name)
    place = _place(config, code)
    with contextlib.suppress(ModelError):  # not there yet, or written by another version
        return msgspec.structs.replace(read_typed(place, ModelFacts, ModelError), name=name)
    facts = ask(Describe(config=dict(config), name=name, code=code), device="cpu").facts
    if facts is None:
        raise JobError(f"the class of {name} was not described", try_="the same command again")
    with contextlib.suppress(OSError, MachineError):
        cache_dir(_FOLDER)
        write_atomic(place, msgspec.json.encode(facts))
    return facts


def shape_note(config: Mapping[str, Any]) -> str:
    """Note on facts that were read from transformers' class; empty for a known family."""
    if is_known(config):
        return ""
    return f"qdist has no file for {config.get('model_type')}: the shape was read from transformers' class"


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a family that has a file of its own, or of none at all."""
    kind = config.get("model_type")
    return kind in FAMILIES if isinstance(kind, str) else True


def _place(config: Mapping[str, Any], code: str) -> Path:
    """The file for a configuration, named by all that determines its facts."""
    own = [[file.name, file.read_text(errors="replace")] for file in sorted(Path(code).glob("*.py"))] if code else []
    parts = [_DESCRIPTION, metadata.version("transformers"), dict(config), *own]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_path() / _FOLDER / f"{key[:32]}.json"
