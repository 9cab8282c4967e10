"""A record whose keys are read one by one, and that knows which of them nobody read."""

from collections.abc import Mapping

from qdist.core.errors import DataError

Record = Mapping[str, object]

SYSTEM = ("system", "system_prompt")
MARKS = ("weight", "train", "training", "loss")
"""Whether a turn is learned, as OpenAI, mistral-finetune, axolotl and ms-swift spell it."""
OF_TOOLS = ("tools", "functions", "tool_calls", "function_call")
_NEVER_DROPPED = frozenset((
    *SYSTEM, *MARKS, *OF_TOOLS, "history", "images", "image", "videos", "video", "audios", "audio",
    "train_detail", "training_detail", "loss_mask", "loss_scale",
))  # fmt: skip
"""Keys that change what a record says: refused, with a value, where nothing is made of them."""


class Fields:
    """A record that remembers which of its keys were read."""

    def __init__(self, record: Record, where: str) -> None:
        self.record, self.where = record, where
        self._read: set[str] = set()

    def has(self, *keys: str) -> str | None:
        """The first of the keys that is there."""
        return next((key for key in keys if key in self.record), None)

    def value(self, *keys: str) -> object:
        """Of the first key with a value, else of the first that is there. Raises DataError where none is."""
        key = self._chosen(*keys)
        if key is None:
            raise DataError(f"{self.where}: {keys[0]!r} is missing; keys found: {found_in(self.record)}")
        self._read.add(key)
        return self.record[key]

    def optional(self, key: str) -> object:
        """None where it is missing, or has no value."""
        return self.value(key) if says_something(self.record.get(key)) else None

    def text(self, *keys: str) -> str:
        """Raises DataError where it is missing or no text."""
        value = self.value(*keys)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: {self._chosen(*keys)!r} must be text, not {kind_of(value)}")
        return value

    def optional_text(self, *keys: str) -> str:
        """Empty where there is none. Of several keys that say the same, all are read."""
        if all(is_empty(self.record.get(key)) for key in keys):
            return ""
        text = self.text(*keys)
        self._read |= {key for key in keys if self.record.get(key) == text}
        return text

    def unused(self) -> tuple[str, ...]:
        """Keys with a value that nobody read. Raises DataError for one that must not be dropped."""
        left = {key: value for key, value in self.record.items() if key not in self._read and not is_empty(value)}
        for key in [key for key in left if key.lower() in _NEVER_DROPPED]:
            if says_something(left.pop(key)):
                raise _not_trained(self.where, key)
        return tuple(left)

    def _chosen(self, *keys: str) -> str | None:
        return next((key for key in keys if not is_empty(self.record.get(key))), self.has(*keys))


def mark_of(fields: Fields) -> bool | None:
    """Whether a turn, or a record, is marked to be learned; None where it is not marked."""
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
    """Whether there is nothing to be lost."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | tuple | Mapping) and not value)


def says_something(value: object) -> bool:
    """Whether a key that is no text has a value; '[]' is how ShareGPT files write no tools."""
    return not is_empty(value) and value not in ("[]", "{}", "null")


def _not_trained(where: str, key: str) -> DataError:
    lowered = key.lower()
    if lowered in OF_TOOLS:
        return DataError(f"{where} has {key!r}, and tool calls are not trained yet", try_=f"records without {key!r}")
    return DataError(
        f"{where} has {key!r}, of which nothing is made in this format", try_=f"messages, or records without {key!r}"
    )


def kind_of(value: object) -> str:
    """What a value is called in messages."""
    names = {type(None): "null", list: "a list", dict: "an object", bool: "true or false"}
    names |= dict.fromkeys((int, float), "a number")
    empty = isinstance(value, list) and not value
    return "an empty list" if empty else names.get(type(value), type(value).__name__)


def found_in(record: Record) -> str:
    """The keys of a record, for messages."""
    return ", ".join(map(str, record)) or "none"
