"""Finds the shipped data folders `launch/` and `ds_configs/`, in a wheel or a checkout."""

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
    """`launch` or `ds_configs`: inside the package if installed from a wheel, else at the checkout's root."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "_data" / name
    return inside if inside.is_dir() else package.parent / name


def policy(name: str) -> dict[str, Any]:
    """One of the policies in `ds_configs/`."""
    loaded: dict[str, Any] = json.loads((folder("ds_configs") / name).read_text())
    return loaded


def job_template(name: str) -> str:
    """One of the files in `launch/` from which jobs of schedulers are made: 'slurm.sh'."""
    return (folder("launch") / f"{name}.in").read_text(encoding="utf-8")


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe's settings, from a TOML file or by the name of a shipped recipe.

    Raises SpecError naming the line of a syntax error, or what was meant: the flag of a model or of data, or the
    nearest recipe.
    """
    return read_toml(recipe_path(name), SpecError, try_="TOML: key = value, sections in [brackets]")


def recipe_path(name: str) -> Path:
    """The file of a recipe, by its path or by the name of a shipped one. Raises SpecError if there is none."""
    path = Path(name)
    if not path.is_file():
        shipped = {file.stem: file for file in sorted(folder("launch").glob("*.toml"))}
        if path.suffix in ("", ".toml") and path.stem in shipped and path.parent == Path("."):
            path = shipped[path.stem]
        else:
            raise SpecError(f"no recipe {name!r}", try_=_meant(path, shipped))
    if path.suffix.lower() in SUFFIXES:
        raise SpecError(f"{path} is data, not a recipe", try_=quoted("--data", path))
    return path


def _meant(path: Path, shipped: Collection[str]) -> str:
    """What to type instead of a recipe that does not exist. shipped: names of recipes."""
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
