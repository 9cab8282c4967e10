"""Which tools does a record offer, and which of them does a turn call? In OpenAI's form, whatever form it has."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from qdist.core.data.record_fields import CALLS, TOOLS, Fields, kind_of, says_something
from qdist.core.errors import DataError

Tool = dict[str, Any]
"""{"type": "function", "function": {"name": ..., "parameters": {...}}}."""
Call = dict[str, Any]
"""{"type": "function", "function": {"name": ..., "arguments": {...}}}, with the "id" if it has one."""

_A_TOOL = '{"type": "function", "function": {"name": "...", "parameters": {}}}'
_A_CALL = '{"type": "function", "function": {"name": "...", "arguments": {}}}'


def tools_of(fields: Fields) -> tuple[Tool, ...]:
    """The tools beside a conversation: a list, also as JSON text, of OpenAI's form or of functions alone.

    Raises DataError for what is not a tool.
    """
    key = _only(fields, TOOLS)
    if key is None:
        return ()
    listed = _listed(fields.value(key), fields.where, key, _A_TOOL)
    return tuple(_tool(each, f"{fields.where}, {key} item {number}") for number, each in enumerate(listed, 1))


def calls_of(fields: Fields) -> tuple[Call, ...]:
    """The calls of a turn: a list or a single one, also as JSON text. Raises DataError for what is not a call."""
    key = _only(fields, CALLS)
    return () if key is None else calls_in(fields, key, fields.value(key))


def calls_in(fields: Fields, key: str, value: object) -> tuple[Call, ...]:
    """The calls in the value of a key. Raises DataError for what is not a call."""
    listed = _listed(value, fields.where, key, _A_CALL)
    return tuple(_call(fields, key, each, number) for number, each in enumerate(listed, 1))


def name_of(call: Call) -> str:
    """The name of the tool that is called."""
    return str(call["function"]["name"])


def _only(fields: Fields, keys: Iterable[str]) -> str | None:
    """The key that says something. Raises DataError where several say different things."""
    said = [key for key in keys if key in fields.record and says_something(fields.record[key])]
    if any(fields.record[key] != fields.record[said[0]] for key in said):
        raise DataError(f"{fields.where} has {' and '.join(map(repr, said))}", try_="one of them")
    for key in said:
        fields.value(key)
    return next(iter(said), None)


def _listed(value: object, where: str, key: str, example: str) -> list[object]:
    """The items of a list, or of one as JSON text; a single object is a list of one."""
    found = _decoded(value, where, key, example) if isinstance(value, str) else value
    return found if isinstance(found, list) else [found]


def _decoded(text: str, where: str, key: str, example: str) -> object:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise DataError(f"{where}: {key!r} is text that is not JSON: {error}", try_=example) from None


def _object(value: object, where: str, what: str, example: str) -> Mapping[str, Any]:
    """A JSON object, also as text. Raises DataError for anything else."""
    found = _decoded(value, where, what, example) if isinstance(value, str) else value
    if not isinstance(found, Mapping):
        raise DataError(f"{where}: {what!r} is {kind_of(found)}, not an object", try_=example)
    return found


def _require_function(kind: object, where: str, example: str) -> None:
    if kind not in (None, "function"):
        raise DataError(f"{where} is of type {kind!r}, and only functions are called", try_=example)


def _tool(value: object, where: str) -> Tool:
    tool = _object(value, where, "tool", _A_TOOL)
    _require_function(tool.get("type"), where, _A_TOOL)
    inside = tool.get("function")
    beside = {key: each for key, each in tool.items() if key not in ("type", "function")}
    function = dict(beside if inside is None else _object(inside, where, "function", _A_TOOL))
    _require_name(function, where, _A_TOOL)
    if isinstance(function.get("parameters"), str):
        function["parameters"] = dict(_object(function["parameters"], where, "parameters", _A_TOOL))
    return {**({} if inside is None else beside), "type": "function", "function": function}


def _call(fields: Fields, key: str, value: object, number: int) -> Call:
    where = f"{fields.where}, call {number}"
    call = fields.inside(_object(value, where, key, _A_CALL), where)
    _require_function(call.optional("type"), where, _A_CALL)
    inner = call.optional("function")
    function = call if inner is None else call.inside(_object(inner, where, "function", _A_CALL), where)
    _require_name(function.record, where, _A_CALL)
    called = {"name": function.text("name"), "arguments": _arguments(function, where)}
    own_id = call.optional_text("id")
    if function is not call:
        call.close("function", function)
    fields.close(key, call)
    return {**({"id": own_id} if own_id else {}), "type": "function", "function": called}


def _arguments(function: Fields, where: str) -> dict[str, Any]:
    """The arguments as an object; none where they are missing, null or empty text."""
    key = function.chosen("arguments", "parameters")
    value = function.value(key) if key else None
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    return dict(_object(value, where, str(key), _A_CALL))


def _require_name(function: Mapping[str, object], where: str, example: str) -> None:
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise DataError(
            f"{where} names no function: 'name' is {'empty' if isinstance(name, str) else kind_of(name)}", try_=example
        )
