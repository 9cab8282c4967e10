"""Finds the shipped data folders `launch/` and `ds_configs/`, from a wheel and from a checkout alike."""

import json
import tomllib
from pathlib import Path
from typing import Any

from qdist.core.errors import SpecError, nearest


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

    Raises SpecError naming the line of a syntax error, or the nearest shipped recipe.
    """
    path = Path(name)
    if not path.is_file():
        shipped = {file.stem: file for file in sorted(folder("launch").glob("*.toml"))}
        if path.suffix in ("", ".toml") and path.stem in shipped and path.parent == Path("."):
            path = shipped[path.stem]
        else:
            raise SpecError(f"no recipe {name!r}", try_=nearest(path.stem, shipped) or ", ".join(shipped))
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: {error}", try_="TOML: key = value, sections in [brackets]") from None
