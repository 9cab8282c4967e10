"""The keys of a record under our names, where the data has others for them."""

from collections.abc import Mapping
from contextlib import suppress

from qdist.core.data.record_fields import Record, found_in
from qdist.core.errors import DataError, nearest


def renamed(record: Record, columns: Mapping[str, str], where: str) -> Record:
    """A record with its columns under our names.

    columns: the data's names by ours. {"output": "meta.answer"} takes a key of an object; {"messages.role": "speaker"}
    renames a key of every turn in the list that is ours to call messages.
    A key that already has our name, and is not renamed itself, is kept as 'KEY (its own)', so that it is named as
    unused. Raises DataError where a column is missing.
    """
    if not columns:
        return record
    whole = {ours: theirs for ours, theirs in columns.items() if "." not in ours}
    found = {ours: _at(record, theirs, ours, where) for ours, theirs in whole.items()}
    left: Record = record
    for theirs in whole.values():
        left = _without(left, theirs)
    named = {**found, **{f"{key} (its own)" if key in found else key: value for key, value in left.items()}}
    for ours, theirs in columns.items():
        holder, dot, key = ours.partition(".")
        if dot:
            named[holder] = _in_turns(named.get(holder), key, theirs, f"{where}: {holder!r}")
    return named


def columns_in(record: Record, columns: Mapping[str, str]) -> dict[str, str]:
    """Those of the columns that a record has: a prompt has no answer, and may have our names already."""
    found: dict[str, str] = {}
    for ours, theirs in sorted(columns.items(), key=lambda pair: "." in pair[0]):  # lists before keys of their turns
        with suppress(DataError):
            renamed(record, {**found, ours: theirs}, "")
            found[ours] = theirs
    return found


def _at(record: Record, path: str, ours: str, where: str) -> object:
    """The value of a column, or of a key within it."""
    if path in record:
        return record[path]
    head, dot, rest = path.partition(".")
    inner = record.get(head)
    if dot and isinstance(inner, Mapping):
        return _at(inner, rest, ours, f"{where}, {head}")
    close = nearest(path, map(str, record))
    raise DataError(
        f"{where}: there is no {path!r} to read as {ours!r}; keys found: {found_in(record)}",
        try_=f"data.columns with {ours}={close}" if close else "data.columns with names that the records have",
    )


def _without(record: Record, path: str) -> Record:
    """A record without a column, or without a key of it; without the column as well once nothing is left in it."""
    head, _, rest = path.partition(".")
    inner = record.get(head)
    left = {key: value for key, value in record.items() if key not in (path, head)}
    if path in record or not isinstance(inner, Mapping):
        return {key: value for key, value in record.items() if key != path}
    beside = _without(inner, rest)
    return {**left, head: beside} if beside else left


def _in_turns(turns: object, ours: str, theirs: str, where: str) -> object:
    """Turns with one key of each renamed. Turns may lack it, but not all of them."""
    items = turns if isinstance(turns, list) else []
    if not any(isinstance(item, Mapping) and theirs in item for item in items):
        raise DataError(
            f"{where} has no turn with {theirs!r} to read as {ours!r}",
            try_="data.columns with a key that the turns have",
        )
    return [_renamed_turn(item, ours, theirs) for item in items]


def _renamed_turn(turn: object, ours: str, theirs: str) -> object:
    if not isinstance(turn, Mapping) or theirs not in turn:
        return turn
    left = {f"{key} (its own)" if key == ours else key: value for key, value in turn.items() if key != theirs}
    return {ours: turn[theirs], **left}
