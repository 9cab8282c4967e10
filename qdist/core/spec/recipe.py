"""A spec as a recipe: TOML that `qdist launch` reads back."""

from typing import Any

import msgspec

from qdist.core.spec.run_spec import RunSpec


def to_toml(spec: RunSpec) -> str:
    """The spec as a recipe that `qdist launch` reads back; what the plan decides is left out."""
    plain = msgspec.to_builtins(spec)
    lines = [
        f"{key} = {toml_value(value)}"
        for key, value in plain.items()
        if not isinstance(value, dict) and value is not None
    ]
    for section, settings in plain.items():
        if isinstance(settings, dict):
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {toml_value(value)}" for key, value in settings.items() if value is not None]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """TOML's strings, numbers, booleans and arrays of strings are JSON's, but for DEL, which TOML wants escaped."""
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
