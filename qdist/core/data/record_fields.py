"""Reads a record's keys one by one: who speaks, the text, what is learned; and tracks the keys that were not read."""

import json
from collections.abc import Mapping

from qdist.core.data.conversation import Role, Turn
from qdist.core.errors import DataError

Record = Mapping[str, object]

SYSTEM = ("system", "system_prompt")
MARKS = ("weight", "train", "training", "loss")
"""Keys for whether a turn is learned, as spelled by OpenAI, mistral-finetune, axolotl and ms-swift."""
OF_TOOLS = ("tools", "functions", "tool_calls", "function_call")
_NEVER_DROPPED = frozenset((
    *SYSTEM, *MARKS, *OF_TOOLS, "history", "images", "image", "videos", "video", "audios", "audio",
    "train_detail", "training_detail", "loss_mask", "loss_scale",
))  # fmt: skip
"""Keys that change the meaning of a record: refused if they have a value and are not used."""


class Fields:
    """A record that remembers which of its keys were read."""

    def __init__(self, record: Record, where: str) -> None:
        self.record, self.where = record, where
        self._read: set[str] = set()

    def has(self, *keys: str) -> str | None:
        """The first of the keys that is present, or None."""
        return next((key for key in keys if key in self.record), None)

    def value(self, *keys: str) -> object:
        """Value of the first key that has one, else of the first key present. Raises DataError if none is present."""
        key = self._chosen(*keys)
        if key is None:
            raise DataError(f"{self.where}: {keys[0]!r} is missing; keys found: {found_in(self.record)}")
        self._read.add(key)
        return self.record[key]

    def optional(self, key: str) -> object:
        """Value of the key; None if it is missing or has no value."""
        return self.value(key) if says_something(self.record.get(key)) else None

    def text(self, *keys: str) -> str:
        """`value` as text. Raises DataError if it is missing or not text."""
        value = self.value(*keys)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: {self._chosen(*keys)!r} must be text, not {kind_of(value)}")
        return value

    def optional_text(self, *keys: str) -> str:
        """`text`, or empty if there is none. Of several keys with the same text, all count as read."""
        if all(is_empty(self.record.get(key)) for key in keys):
            return ""
        text = self.text(*keys)
        self._read |= {key for key in keys if self.record.get(key) == text}
        return text

    def unused(self) -> tuple[str, ...]:
        """Keys with a value that were not read. Raises DataError for one that must not be dropped."""
        left = {key: value for key, value in self.record.items() if key not in self._read and not is_empty(value)}
        for key in [key for key in left if key.lower() in _NEVER_DROPPED]:
            if says_something(left.pop(key)):
                raise _not_trained(self.where, key)
        return tuple(left)

    def _chosen(self, *keys: str) -> str | None:
        return next((key for key in keys if not is_empty(self.record.get(key))), self.has(*keys))


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
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | tuple | Mapping) and not value)


def says_something(value: object) -> bool:
    """Whether a value that is not text says anything; ShareGPT files write '[]' for no tools."""
    return not is_empty(value) and value not in ("[]", "{}", "null")


def _not_trained(where: str, key: str) -> DataError:
    lowered = key.lower()
    if lowered in OF_TOOLS:
        return DataError(f"{where} has {key!r}, and tool calls are not trained yet", try_=f"records without {key!r}")
    return DataError(
        f"{where} has {key!r}, of which nothing is made in this format", try_=f"messages, or records without {key!r}"
    )


def kind_of(value: object) -> str:
    """Name of a value's type, for messages."""
    names = {type(None): "null", list: "a list", dict: "an object", bool: "true or false"}
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
MESSAGES, SHARED = ("messages",), ("conversations", "conversation", "dialog", "dialogue")
"""Keys of a list of turns."""
_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "ai": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip
_TOOLS = frozenset(("tool", "tools", "function", "function_call", "tool_call", "observation", "ipython"))
"""Roles of the tools that a model calls."""
_SPEAKER, _WORDS = ("role", "from"), ("content", "value", "text")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def holder_of(record: Record, *keys: str) -> str | None:
    """The key of the list of turns: one that has some, else one that should."""
    lists = sorted((key for key in keys if isinstance(record.get(key), list)), key=lambda key: not record[key])
    meant = [key for key in (*MESSAGES, SHARED[0]) if key in keys and record.get(key) is not None]
    return next(iter((*lists, *meant)), None)


def turns_of(fields: Fields, holder: str) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The turns in a list, and their keys that were not used."""
    texts = fields.record.get(holder)
    if holder not in MESSAGES and isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        fields.value(holder)
        return tuple(answer_of(text) if at % 2 else Turn("user", text, False) for at, text in enumerate(texts)), ()
    items = [Fields(item, f"{fields.where}, turn {number}") for number, item in items_of(fields, holder)]
    turns = tuple(turn for item in items for turn in ((_turn(item),) if item.has(*_SPEAKER) else _exchange(item)))
    unused = dict.fromkeys(f"{holder}.{key}" for item in items for key in item.unused())
    return turns, tuple(unused)


def with_system(fields: Fields, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Turns that begin with what asks, behind the system message that stands beside them."""
    if turns[0].role == "assistant":
        raise DataError(
            f"{fields.where}: the first turn is the assistant's, so nothing asks for it", try_="remove that turn"
        )
    system = fields.optional_text(*SYSTEM)
    own = [turn.text for turn in turns if turn.role == "system"]
    if system and own and own[0].strip() != system.strip():
        raise DataError(
            f"{fields.where}: 'system' says {_short(system)}, and a turn of the system's {_short(own[0])}",
            try_="keep one of the two",
        )
    return (Turn("system", system, False), *turns) if system and not own else turns


def _exchange(fields: Fields) -> tuple[Turn, ...]:
    """A question and its answer in one item, as `input` and `output`, after what was said before."""
    pair = pair_of(fields.record)
    if pair is None:
        return (_turn(fields),)  # which says what is missing
    answer = answer_of(fields.text(pair[1]), mark_of(fields))
    return (*opening_of(fields), Turn("user", fields.text(pair[0]), False), answer)


def _turn(fields: Fields) -> Turn:
    said_by = fields.text(*_SPEAKER)
    name = said_by.strip().lower()
    calls = next((key for key in OF_TOOLS if says_something(fields.record.get(key))), None)
    if name in _TOOLS or calls:
        what = f"calls tools ({calls!r})" if calls else f"is of {fields.has(*_SPEAKER)!r} {said_by!r}"
        raise DataError(
            f"{fields.where} {what}, and tool calls are not trained yet", try_="records without tools and their calls"
        )
    if name not in _ROLES:
        known = ", ".join(_ROLES)
        raise DataError(f"{fields.where}: {fields.has(*_SPEAKER)!r} is {said_by!r}", try_=f"one of {known}")
    role, text, mark = _ROLES[name], _words(fields), mark_of(fields)
    if mark and role != "assistant":
        raise DataError(
            f"{fields.where} is {whose(role)} and is marked to be learned; the loss is taken on the assistant's turns",
            try_="remove the mark, or train on everything: --set train.train_on_source=true",
        )
    if thought := next((key for key in _THOUGHTS if not is_empty(fields.record.get(key))), None):
        raise DataError(
            f"{fields.where} has {thought!r}, and reasoning is trained where it is part of the content",
            try_="content of <think>, the reasoning, </think> and the answer",
        )
    return answer_of(text, mark) if role == "assistant" else Turn(role, text, False)


def _words(fields: Fields) -> str:
    """The text of a turn; for a list of parts, their texts concatenated."""
    value = fields.value(*_WORDS)
    if not isinstance(value, list):
        return fields.text(*_WORDS)
    return "".join(_part(part, fields.where) for part in value)


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise DataError(f"{where}: a part of the content is {kind_of(part)}", try_='{"type": "text", "text": "..."}')
    kind = part.get("type", "text")
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(f"{where} holds a part of type {kind!r}, and only text is trained", try_="records of text")
    return str(part["text"])


def answer_of(text: str, mark: bool | None = None) -> Turn:
    """The answer's turn, learned unless marked otherwise; an empty answer is not learned."""
    return Turn("assistant", text, mark is not False and bool(text.strip()))


def opening_of(fields: Fields) -> tuple[Turn, ...]:
    """Turns before an exchange, given beside it: a system message, and earlier exchanges."""
    system, history = fields.optional_text(*SYSTEM), fields.optional("history")
    turns = [Turn("system", system, False)] if system else []
    if history is None:
        return tuple(turns)
    if not isinstance(history, list) or not all(_is_exchange(pair) for pair in history):
        raise DataError(f"{fields.where}: 'history' must be a list of pairs", try_='[["question", "answer"], ...]')
    for question, answer in history:
        turns += [Turn("user", question, False), answer_of(answer)]
    return tuple(turns)


def _is_exchange(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def pair_of(record: Record) -> tuple[str, str] | None:
    """The keys of question and answer: both with a value, else both present."""
    there = [pair for pair in PAIRS if pair[0] in record and pair[1] in record]
    return next(iter(sorted(there, key=lambda pair: record[pair[0]] is None or record[pair[1]] is None)), None)


def whose(role: Role) -> str:
    """'the user's', 'the assistant's'."""
    return f"the {role}'s"


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= 24 else f"{text[:24]}...", ensure_ascii=False)
