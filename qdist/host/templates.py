"""Finds the shipped data folders `launch/` and `ds_configs/`, from a wheel and from a checkout alike."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qdist.core.errors import ModelError, SpecError, nearest
from qdist.core.model.aliases import lookup
from qdist.core.text import quoted
from qdist.host.data.files import SUFFIXES
from qdist.host.opening import read_toml


def folder(name: str) -> Path:
    """`launch` or `ds_configs`: inside the package when installed from a wheel, else at the checkout's root."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "_data" / name
    return inside if inside.is_dir() else package.parent / name


def policy(name: str) -> dict[str, Any]:
    """One of `ds_configs/`."""
    loaded: dict[str, Any] = json.loads((folder("ds_configs") / name).read_text())
    return loaded


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe's settings: a TOML file, or the name of one that is shipped.

    Raises SpecError naming the line of a syntax error, or what was meant: the flag of a model or of data, or the
    nearest recipe.
    """
    path = Path(name)
    if not path.is_file():
        shipped = {file.stem: file for file in sorted(folder("launch").glob("*.toml"))}
        if path.suffix in ("", ".toml") and path.stem in shipped and path.parent == Path("."):
            path = shipped[path.stem]
        else:
            raise SpecError(f"no recipe {name!r}", try_=_meant(path, shipped))
    if path.suffix.lower() in SUFFIXES:
        raise SpecError(f"{path} is data, not a recipe", try_=quoted("--data", path))
    return read_toml(path, SpecError, try_="TOML: key = value, sections in [brackets]")


def _meant(path: Path, shipped: Collection[str]) -> str:
    """What to type in place of a recipe that is not there. shipped: names of recipes."""
    if (path / "config.json").is_file() or path.suffix.lower() == ".gguf" or _is_model(str(path)):
        return quoted("--model", path)
    if path.is_dir():
        return quoted("--data", path)
    here = {file.stem: str(file) for file in path.parent.glob("*.toml")}
    close = nearest(path.stem, [*here, *shipped])
    return here.get(close, close) if close else ", ".join(shipped)


def _is_model(name: str) -> bool:
    try:
        lookup(name)
    except ModelError:
        return False
    return True
