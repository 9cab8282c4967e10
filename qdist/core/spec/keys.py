"""Which settings does a nested struct have, by dotted key; what is each for, and which values may it take?"""

import tomllib
from typing import Any

import msgspec

from qdist.core.errors import SpecError, typed

Kind = type[msgspec.Struct]


def known_keys(kind: Kind, prefix: str = "") -> dict[str, Kind | None]:
    """Every dotted key; a section maps to its type, a setting to None."""
    keys: dict[str, Kind | None] = {}
    for field in msgspec.structs.fields(kind):
        section = field.type if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct) else None
        keys[prefix + field.name] = section
        if section is not None:
            keys.update(known_keys(section, f"{prefix}{field.name}."))
    return keys


def choices(kind: Kind, key: str) -> list[str]:
    """The words that a setting accepts; empty if it takes other values."""
    inner = [each.item_type if isinstance(each, msgspec.inspect.VarTupleType) else each for each in kinds_of(kind, key)]
    return [str(value) for each in inner if isinstance(each, msgspec.inspect.LiteralType) for value in each.values]


def optional(kind: Kind, key: str) -> bool:
    """Whether the plan decides if the setting is absent."""
    return any(isinstance(each, msgspec.inspect.NoneType) for each in kinds_of(kind, key))


def description(kind: Kind, key: str) -> str:
    """A setting's description, from its field; empty if the field has none."""
    info = _info(kind, key)
    stated = info.extra_json_schema if isinstance(info, msgspec.inspect.Metadata) else None
    return str((stated or {}).get("description", ""))


def accepted(kind: Kind, key: str) -> str:
    """The values that a setting takes, in words: 'nf4, fp4', 'integer >= 1', 'names with commas'."""
    if among := choices(kind, key):
        return ", ".join(among) + ("; several with commas" if is_list(kind, key) else "")
    return " or ".join(
        _in_words(each) for each in kinds_of(kind, key) if not isinstance(each, msgspec.inspect.NoneType)
    )


def read_value(kind: Kind, key: str, text: str) -> Any:
    """What was typed for a setting: bare words, several with commas where it is a list, or a TOML value.

    Raises SpecError for quotes or brackets that TOML cannot read.
    """
    listed, plain = is_list(kind, key), text.replace("_", "")
    number = ("_" in text and plain[:1].isdigit()) or plain[:2] in ("0x", "0o", "0b")
    if number and not any(isinstance(each, msgspec.inspect.StrType) for each in kinds_of(kind, key)):
        return _read_toml(text, text)
    if not text.startswith(("'", '"', "[") if listed else ("'", '"')):
        return names_of(text) if listed else text
    value = _read_toml(text)
    if value is not None:
        return names_of(value) if listed else value
    names = names_of(text)
    if listed and not set("'\"") & set(text) and all(name.count("[") == name.count("]") for name in names):
        return names  # [INST],[/INST] are two words of some models
    bare = ",".join(filter(None, (name.strip("'\"[] ") for name in names)))
    kinds = "neither names with commas nor a whole TOML list or string" if listed else "not a whole TOML string"
    raise SpecError(f"{key} cannot be {text!r}: it is {kinds}", try_=typed(key, bare) if bare else f"another {key}")


def _read_toml(text: str, otherwise: Any = None) -> Any:
    """A TOML value; `otherwise` for text that is not TOML."""
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return otherwise
    return read["value"] if len(read) == 1 else otherwise


def names_of(value: Any) -> Any:
    """The comma-separated names in a text; anything else unchanged."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def is_list(kind: Kind, key: str) -> bool:
    """Whether a setting takes several values."""
    return any(isinstance(each, msgspec.inspect.VarTupleType) for each in kinds_of(kind, key))


def is_texts(kind: Kind, key: str) -> bool:
    """Whether a setting takes several texts, which commas do not part."""
    lists = [each for each in kinds_of(kind, key) if isinstance(each, msgspec.inspect.VarTupleType)]
    return any(isinstance(each.item_type, msgspec.inspect.StrType) for each in lists)


def _in_words(info: msgspec.inspect.Type) -> str:
    if isinstance(info, (msgspec.inspect.IntType, msgspec.inspect.FloatType)):
        bounds = ((">=", info.ge), (">", info.gt), ("<", info.lt))  # those above are the largest that are stored
        name = "integer" if isinstance(info, msgspec.inspect.IntType) else "number"
        return " ".join((name, ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)))
    if isinstance(info, msgspec.inspect.BoolType):
        return "true, false"
    return "names with commas" if isinstance(info, msgspec.inspect.VarTupleType) else "text"


def kinds_of(kind: Kind, key: str) -> tuple[msgspec.inspect.Type, ...]:
    """The types that a setting may have."""
    info = _info(kind, key)
    info = info.type if isinstance(info, msgspec.inspect.Metadata) else info
    return info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)


def _info(kind: Kind, key: str) -> msgspec.inspect.Type:
    """msgspec's information on a field."""
    found: type = kind
    for part in key.split("."):
        found = {field.encode_name: field.type for field in msgspec.structs.fields(found)}[part]
    return msgspec.inspect.type_info(found)


def json_text(value: Any) -> str:
    """A setting as one types it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return msgspec.json.encode(value).decode().strip('"')
