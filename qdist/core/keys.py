"""Which settings does a nested struct have, by dotted key, and which values may each take?"""

import msgspec

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
    """The words that a setting is one of; empty where it takes other values."""
    inner = [each.item_type if isinstance(each, msgspec.inspect.VarTupleType) else each for each in _kinds(kind, key)]
    return [str(value) for each in inner if isinstance(each, msgspec.inspect.LiteralType) for value in each.values]


def optional(kind: Kind, key: str) -> bool:
    """Whether the plan decides where the setting is absent."""
    return any(isinstance(each, msgspec.inspect.NoneType) for each in _kinds(kind, key))


def _kinds(kind: Kind, key: str) -> tuple[msgspec.inspect.Type, ...]:
    """The types that a setting may have."""
    found: type = kind
    for part in key.split("."):
        found = {field.name: field.type for field in msgspec.structs.fields(found)}[part]
    info = msgspec.inspect.type_info(found)
    return info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
