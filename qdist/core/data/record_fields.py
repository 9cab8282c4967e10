"""Reads a record's keys one by one: their values, marks of what is learned; and tracks the keys that were not read."""

from collections.abc import Mapping

from qdist.core.errors import DataError

Record = Mapping[str, object]

SYSTEM = ("system", "system_prompt")
MARKS = ("weight", "train", "training", "loss")
"""Keys for whether a turn is learned, as spelled by OpenAI, mistral-finetune, axolotl and ms-swift."""
TOOLS, CALLS = ("tools", "functions"), ("tool_calls", "function_call")
"""Keys of the tools that there are, beside a conversation, and of the calls that an answer makes."""
_NEVER_DROPPED = frozenset((
    *SYSTEM, *MARKS, *TOOLS, *CALLS, "history", "images", "image", "videos", "video", "audios", "audio",
    "train_detail", "training_detail", "loss_mask", "loss_scale", "kto_tag", "reasoning_content", "thinking",
))  # fmt: skip
"""Keys that change the meaning of a record: refused if they have a value and are not used."""


class Fields:
    """A record that remembers which of its keys were read.

    speakers: role of each name that turns may be said by, in lower case.
    """

    def __init__(self, record: Record, where: str, speakers: Mapping[str, str]) -> None:
        self.record, self.where, self.speakers = record, where, speakers
        self._read: set[str] = set()
        self._inside: dict[str, None] = {}

    def inside(self, record: Record, where: str) -> "Fields":
        """An object within this record, such as a turn."""
        return Fields(record, where, self.speakers)

    def close(self, key: str, inner: "Fields") -> None:
        """Take over the unused keys of an object under `key`. Raises DataError as `unused` does."""
        self._inside |= dict.fromkeys(f"{key}.{name}" for name in inner.unused())

    def has(self, *keys: str) -> str | None:
        """The first of the keys that is present, or None."""
        return next((key for key in keys if key in self.record), None)

    def value(self, *keys: str) -> object:
        """Value of the first key that has one, else of the first key present. Raises DataError if none is present."""
        key = self.chosen(*keys)
        if key is None:
            raise DataError(f"{self.where}: {keys[0]!r} is missing; keys found: {found_in(self.record)}")
        self._read.add(key)
        return self.record[key]

    def optional(self, key: str) -> object:
        """Value of the key; None if it is missing or has no value."""
        value = self.record.get(key)
        if value is None or not says_something(value):
            return None
        self._read.add(key)
        return value

    def text(self, *keys: str) -> str:
        """`value` as text. Raises DataError if it is missing or not text."""
        value = self.value(*keys)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: {self.chosen(*keys)!r} must be text, not {kind_of(value)}")
        return value

    def optional_text(self, *keys: str) -> str:
        """`text`, or empty if there is none. Of several keys with the same text, all count as read."""
        if not any(key in self.record and not is_empty(self.record[key]) for key in keys):
            return ""
        text = self.text(*keys)
        self._read |= {key for key in keys if self.record.get(key) == text}
        return text

    def unused(self) -> tuple[str, ...]:
        """Keys with a value that were not read. Raises DataError for one that must not be dropped."""
        left = {key: value for key, value in self.record.items() if key not in self._read and not is_empty(value)}
        for key in [key for key in left if key.lower() in _NEVER_DROPPED]:
            if says_something(left.pop(key)):
                raise DataError(
                    f"{self.where} has {key!r}, of which nothing is made in this format",
                    try_=f"messages, or records without {key!r}",
                )
        return (*self._inside, *left)

    def chosen(self, *keys: str) -> str | None:
        """The first of the keys that has a value, else the first present, or None."""
        there = [key for key in keys if key in self.record]
        return next((key for key in there if not is_empty(self.record[key])), there[0] if there else None)


def mark_of(fields: Fields) -> bool | None:
    """Whether a turn, or a record, is marked to be learned; None if unmarked."""
    found: dict[str, bool] = {}
    for key in MARKS:
        value = fields.optional(key)
        if value is None:
            continue
        if value not in (0, 1):  # True and False are equal to these
            raise DataError(
                f"{fields.where}: {key!r} is {value!r}, and a turn is learned or not", try_=f"{key!r} of 0, 1 or null"
            )
        found[key] = bool(value)
    if len(set(found.values())) > 1:
        raise DataError(f"{fields.where}: {' and '.join(map(repr, found))} contradict each other", try_="one of them")
    return next(iter(found.values()), None)


def items_of(fields: Fields, key: str) -> list[tuple[int, Record]]:
    """The objects listed under a key, numbered from 1. Raises DataError when it is not a list of objects."""
    items, where = fields.value(key), fields.where
    if not isinstance(items, list) or not items:
        raise DataError(f"{where}: {key!r} must be a list with at least one object, not {kind_of(items)}")
    for number, item in enumerate(items, 1):
        if not isinstance(item, Mapping):
            raise DataError(f"{where}: {key!r} item {number} must be an object, not {kind_of(item)}")
    return list(enumerate(items, 1))


def is_empty(value: object) -> bool:
    """Whether dropping the value would lose nothing."""
    if value is None or isinstance(value, str):
        return not (value and value.strip())
    return isinstance(value, list | tuple | Mapping) and not value


def says_something(value: object) -> bool:
    """Whether a value that is not text says anything; ShareGPT files write '[]' for no tools."""
    return not is_empty(value) and value not in ("[]", "{}", "null")


def kind_of(value: object) -> str:
    """Name of a value's type, for messages."""
    names = {type(None): "null", list: "a list", dict: "an object", bool: "true or false", str: "text"}
    names |= dict.fromkeys((int, float), "a number")
    empty = isinstance(value, list) and not value
    return "an empty list" if empty else names.get(type(value), type(value).__name__)


def found_in(record: Record) -> str:
    """The keys of a record, for messages."""
    return ", ".join(map(str, record)) or "none"


PAIRS = (
    ("input", "output"), ("prompt", "completion"), ("question", "answer"), ("prompt", "response"),
    ("question", "response"), ("query", "response"), ("query", "answer"), ("problem", "solution"),
    ("question", "solution"), ("inputs", "targets"), ("prompt", "output"), ("prompt", "answer"),
)  # fmt: skip


def pair_of(record: Record) -> tuple[str, str] | None:
    """The keys of question and answer: both with a value, else both present."""
    there = [pair for pair in PAIRS if pair[0] in record and pair[1] in record]
    return next(iter(sorted(there, key=lambda pair: record[pair[0]] is None or record[pair[1]] is None)), None)
