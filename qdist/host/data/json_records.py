"""Records in JSON: one object per line, one list, concatenated objects, or one object that contains the list."""

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any, Literal, TextIO

from qdist.core.errors import DataError
from qdist.core.text import first_few
from qdist.host.data.text import FIELDS, Located, Record, lines, open_text
from qdist.host.opening import JSON_KINDS, holds_half_pair

_CHUNK = 1 << 20
"""Characters read from a file at a time."""
_LONGEST_WORD = len("-Infinity") + 1
_SPACE = re.compile(r"[ \t\n\r]*")
_START = re.compile(r'\s*(\{\s*["}]|\[\s*(["{}\[\]]|$))')
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_LINE = "one whole JSON object a line, its strings closed"
_EXAMPLE = 'one object a line, such as {"prompt": "...", "completion": "..."}'
_VALUE = "one whole JSON value there, its strings closed"
_LISTS = frozenset(("messages", "conversations", "conversation", "instances"))
"""Keys of a record whose values are lists."""


def json_records(path: Path) -> Iterator[Located]:
    """The records of a JSON file in any of the four layouts; lines and lists are streamed, not held in memory.

    Raises DataError for an object that is not a record and holds no list of them, and where a list or an object over
    many lines breaks off; a line that is not an object is told in its place.
    """
    opening, first, more = _beginning(path)
    if opening == "[":
        return _numbered(path, _listed(path))
    state = line_state(first) if opening == "{" else "broken"
    if state == "object" and not more:
        only = json.loads(first.removeprefix("\ufeff"))
        found = _records_in(only, path)
        return _line_records(path) if found[0] is only else _numbered(path, iter(found))
    return _over_lines(path) if state == "cut" and more else _line_records(path)


def _over_lines(path: Path) -> Iterator[Located]:
    """Objects that span lines; if the first is invalid and most lines are objects, treat it as one broken line."""
    values = _values(path)
    try:
        first = next(values)
    except DataError:
        states = [line_state(line) for line in lines(path) if line.strip()]
        if states.count("object") * 2 <= len(states):
            raise
        return _line_records(path)
    return _numbered(path, chain([first], values))


def holds_json(text: str, *, whole: bool) -> bool:
    """Whether the beginning of a file without a known suffix is JSON records rather than text in brackets.

    whole: the text is all of the file.
    """
    if not _START.match(text):
        return False
    if not whole and "\n" not in text.lstrip():
        return True  # a line of tens of thousands of characters
    first, *others = [line for line in text.split("\n") if line.strip()][:20]
    return line_state(first) != "broken" or any(line_state(line) == "object" for line in others)


def line_state(line: str) -> Literal["object", "value", "cut", "broken"]:
    """Whether a line is a JSON object, another JSON value, the beginning of one, or neither."""
    text = line.strip().removeprefix("\ufeff")
    try:
        return "object" if isinstance(json.loads(text), dict) else "value"
    except json.JSONDecodeError as error:
        return "cut" if error.pos >= len(text) else "broken"
    except (ValueError, RecursionError):
        return "broken"


def _beginning(path: Path) -> tuple[str, str, bool]:
    """The first non-space character; for an object, also its line and whether more lines with text follow."""
    with open_text(path) as stream:
        head = next((text for chunk in iter(lambda: stream.read(_CHUNK), "") if (text := chunk.lstrip())), "")
        if not head.startswith("{"):
            return head[:1], "", True
        head, newline, rest = head.partition("\n")
        first = head if newline else head + stream.readline()
        return "{", first, bool(rest.strip()) or any(line.strip() for line in stream)


def _line_records(path: Path) -> Iterator[Located]:
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _parsed(line: str, where: str) -> Record | DataError:
    text = line.removeprefix("\ufeff")
    try:
        return _record(json.loads(text), where, escaped=_ESCAPED.search(text) is not None)
    except json.JSONDecodeError as error:
        return DataError(f"{where}:{error.colno}: invalid JSON: {_reason(error)}", try_=_LINE)
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: {_beyond(error)}")


def _reason(error: json.JSONDecodeError) -> str:
    rest = error.doc[error.pos :].rstrip()
    if rest.startswith("\0"):
        return "a NUL byte"
    if error.msg == "Extra data" and rest == ",":
        return "a comma after the object"
    return error.msg.removesuffix(" at")  # json's own sentence ends with the position


def _beyond(error: Exception) -> str:
    """The message for json's exceptions other than JSONDecodeError: RecursionError, and ValueError from int()."""
    return "JSON nested too deeply" if isinstance(error, RecursionError) else "a number of more than 4,300 digits"


def _record(item: object, where: str, *, escaped: bool = True) -> Record | DataError:
    """A record, or the error in its place. escaped: it may contain half a surrogate pair, which tokenizers fail on."""
    if not isinstance(item, dict):
        return DataError(f"{where}: a record must be a JSON object, not {JSON_KINDS[type(item)]}", try_=_EXAMPLE)
    try:
        if escaped and holds_half_pair(item):
            return DataError(
                f"{where}: half of a surrogate pair, which is not a character", try_="leave out that record"
            )
    except RecursionError as error:
        return DataError(f"{where}: {_beyond(error)}")
    return item


def _numbered(path: Path, items: Iterator[object]) -> Iterator[Located]:
    for number, item in enumerate(items, 1):
        where = f"{path}, record {number}"
        yield where, _record(item, where)


def _listed(path: Path) -> Iterator[object]:
    with open_text(path) as stream:
        scanner = _Scanner(stream, path)
        yield from scanner.items()


def _values(path: Path) -> Iterator[object]:
    """Concatenated objects, one at a time; a single object is the record itself or contains the list."""
    with open_text(path) as stream:
        scanner = _Scanner(stream, path)
        first = scanner.value()
        if isinstance(first, dict) and not scanner.peek():
            yield from _records_in(first, path)
            return
        yield first
        while scanner.peek():
            yield scanner.value()


def _records_in(found: Record, path: Path) -> list[object]:
    """The records in a file's only object: the object itself or its list. Raises DataError if it is neither."""
    table = _table(found)
    if FIELDS & found.keys() and not table:
        return [found]
    lists = {key: value for key, value in found.items() if isinstance(value, list) and _has_objects(value)}
    if len(lists) == 1:
        return next(iter(lists.values()))
    keys = f"keys {first_few(tuple(found), most=8)}" if found else "no keys"
    first = next((key for key in lists if key.startswith("train")), next(iter(lists), ""))
    made = table or (f"d[{_literal(first)}]" if lists else "")
    raise DataError(
        f"{path} is one JSON object with {keys}; a list of records is wanted",
        try_=_rewriting(path, made) if made else _EXAMPLE,
    )


def _has_objects(items: list[object]) -> bool:
    return any(isinstance(item, dict) for item in items)


def _table(found: Record) -> str:
    """A Python expression that turns an object `d` written by pandas into records; empty if it is not a table."""
    values = list(found.values())
    if {"columns", "data"} <= found.keys():
        return '[dict(zip(d["columns"], row)) for row in d["data"]]'
    if values and all(isinstance(value, dict) and value for value in values):
        inner = [key for value in values if isinstance(value, dict) for key in value]
        by_columns = "[dict(zip(d, row)) for row in zip(*(v.values() for v in d.values()))]"
        return by_columns if all(map(str.isdigit, inner)) else "list(d.values())" if FIELDS & set(inner) else ""
    cells = [value for value in values if isinstance(value, list) and value and not _has_objects(value)]
    turns = _LISTS & found.keys()
    by_lists = values and len(cells) == len(values) and not turns
    return "[dict(zip(d, row)) for row in zip(*d.values())]" if by_lists else ""


def _rewriting(path: Path, records: str) -> str:
    """A command that writes the records to a new file next to this one."""
    out = path.with_name(f"{path.stem}.records.json")
    code = f'import json; d = json.load(open({_literal(path)}, "rb")); json.dump({records}, open({_literal(out)}, "w"))'
    return f"python3 -c {quote(code)}"


def _literal(value: object) -> str:
    """A double-quoted Python string that can stand inside single quotes in a shell."""
    return json.dumps(str(value), ensure_ascii=False)


class _Scanner:
    """Reads JSON values from a text stream one at a time, buffering no more than the current value."""

    def __init__(self, stream: TextIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._text, self._at = "", 0
        self._line, self._column = 1, 1
        self._decoder = json.JSONDecoder()

    def items(self) -> Iterator[object]:
        """The items of the next list, which must be the last thing in the text."""
        self._take("[")
        if self.peek() != "]":
            yield self.value()
            while self.peek() != "]":
                self._take(",")
                yield self.value()
        self._take("]")
        if self.peek():
            raise self._error(self._at, "another value follows the list")

    def peek(self) -> str:
        """The next non-space character; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The next value. Raises DataError with its position if there is none."""
        self.peek()
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._is_cut(error) or not self._more():
                    raise self._error(error.pos, _reason(error)) from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self._path}:{self._place(self._at)}: {_beyond(error)}") from error
            else:
                if end < len(self._text) or isinstance(found, dict | list | str) or not self._more():
                    self._at = end
                    return found

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the value may be complete once more of the text is read."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_WORD

    def _take(self, wanted: str) -> None:
        if self.peek() != wanted:
            raise self._error(self._at, f"Expecting {wanted!r} delimiter")
        self._at += 1

    def _more(self) -> bool:
        """Drop what was consumed and triple the buffer, because a value that spans many chunks is parsed again."""
        chunk = self._stream.read(max(_CHUNK, 3 * (len(self._text) - self._at)))
        if chunk:
            self._line, self._column = self._position(self._at)
            self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

    def _position(self, index: int) -> tuple[int, int]:
        newlines = self._text.count("\n", 0, index)
        if newlines:
            return self._line + newlines, index - self._text.rindex("\n", 0, index)
        return self._line, self._column + index

    def _place(self, index: int) -> str:
        return "{}:{}".format(*self._position(index))

    def _error(self, index: int, reason: str) -> DataError:
        return DataError(f"{self._path}:{self._place(index)}: invalid JSON: {reason}", try_=_VALUE)
