"""Which conversation does a raw record hold, and which turns are learned? Or what is wrong with it?"""

import re
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from qdist.core.data.conversation import ASSISTANT, HUMAN, Conversation, Style, Turn
from qdist.core.data.record_fields import (
    MESSAGES,
    PAIRS,
    SHARED,
    Fields,
    Record,
    answer_of,
    found_in,
    holder_of,
    items_of,
    mark_of,
    opening_of,
    pair_of,
    turns_of,
    whose,
    with_system,
)
from qdist.core.errors import DataError, nearest

_ASKING = ("prompt", "instruction", "question", "text", "input", "query", "problem", "inputs")
_HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: JSON can express it, and a terminal yields it for bytes that are not UTF-8."""


def conversations(record: Record, *, where: str, data_format: str | None = None) -> tuple[Conversation, ...]:
    """The conversations that `record` holds: one, or for Self-Instruct one an instance.

    data_format: a name of `FORMATS`, or None to tell it from the keys.

    Raises DataError, naming `where`, what is missing and which keys were found.
    """
    if data_format is not None:
        check_format(data_format)
    name = data_format or detect(record, where=where)
    fields = Fields(record, where)
    marked = mark_of(fields)
    found = tuple(replace(own, format=name) for own in _READERS[name](fields))
    for own in found:
        require_whole_characters(own)
    unused = fields.unused()
    if marked is False:
        found = tuple(replace(own, turns=tuple(replace(turn, learn=False) for turn in own.turns)) for own in found)
    return tuple(replace(own, unused=(*own.unused, *unused)) for own in found)


def check_format(name: str) -> None:
    """Raise DataError when `name` is not a known record format."""
    if name not in _READERS:
        close = nearest(name, FORMATS)
        raise DataError(f"{name!r} is not a record format", try_=close or ", ".join(FORMATS))


def detect(record: Record, *, where: str) -> str:
    """The name of the format that the keys of `record` show. Raises DataError when they show none."""
    there = {key for key, value in record.items() if value is not None}  # tables have all columns in all records
    if holder := holder_of(record, *MESSAGES, *SHARED):
        return "messages" if holder in MESSAGES else "sharegpt"
    for key, name in (("instances", "self-instruct"), ("instruction", "alpaca")):
        if key in there:
            return name
    if pair := pair_of(record):
        return "oasst" if _is_transcript(record[pair[0]]) else "input-output"
    if "text" in there:
        return "text"
    wanted = (
        "messages, conversations, instruction + output, input + output, prompt + completion, question + answer, text"
    )
    raise DataError(f"{where}: keys {found_in(record)} fit no known record format", try_=f"records with {wanted}")


def asked(record: Record, *, where: str) -> Conversation:
    """What a prompt asks: `messages` or `conversations` that wait for a reply, `prompt`, `instruction`, `question`...

    Raises DataError as `conversations` does, and for one that waits for nothing.
    """
    fields = Fields(record, where)
    if holder := holder_of(record, *MESSAGES, *SHARED, "prompt"):
        turns = with_system(fields, turns_of(fields, holder)[0])
    elif key := fields.has(*_ASKING):
        extra = fields.optional_text("input", "context") if key == "instruction" else ""
        turns = (*opening_of(fields), Turn("user", fields.text(key), False, extra))
    else:
        raise DataError(
            f"{where}: neither 'prompt' nor 'messages' with role and content; keys found: {found_in(record)}",
            try_='{"prompt": "..."}',
        )
    if turns[-1].role != "user":
        raise DataError(
            f"{where}: the last turn is {whose(turns[-1].role)}, so nothing is left to answer",
            try_="a conversation that ends with the user's turn",
        )
    context = tuple(replace(turn, learn=False) for turn in turns)
    verbatim = len(turns) == 1 and _is_transcript(turns[0].text)
    return Conversation(turns=context, where=where, unused=fields.unused(), verbatim=verbatim)


def require_whole_characters(conversation: Conversation) -> None:
    """Raise DataError for text that no tokenizer accepts."""
    for turn in conversation.turns:
        if half := _HALF.search(turn.said):
            raise DataError(
                f"{conversation.where} holds {half.group()!r}, half of a character, which no text can hold",
                try_="the text without it",
            )


def look_of(texts: Iterable[str]) -> tuple[Style, str]:
    """What raw text looks like: turns under headings, with what stands before a heading; else plain text."""
    for text in texts:
        if _is_transcript(text):
            return "headings", re.findall(rf"(\s*){ASSISTANT}", text)[0]
    return "plain", "\n"


def _alpaca(fields: Fields) -> tuple[Conversation, ...]:
    return (_instructed(fields, fields),)


def _self_instruct(fields: Fields) -> tuple[Conversation, ...]:
    found = []
    for number, item in items_of(fields, "instances"):
        instance = Fields(item, f"{fields.where}, instance {number}")
        own = _instructed(fields, instance)
        found.append(replace(own, unused=tuple(f"instances.{key}" for key in instance.unused())))
    return tuple(found)


def _instructed(head: Fields, instance: Fields) -> Conversation:
    """An instruction with the input and output of one instance of it, after what was said before."""
    instruction = head.text("instruction")
    answer = instance.text("output", "response")
    extra = instance.optional_text("input", "context")
    turns = (*opening_of(head), Turn("user", instruction, False, extra), answer_of(answer))
    return Conversation(turns=turns, where=instance.where, style="alpaca")


def _input_output(fields: Fields) -> tuple[Conversation, ...]:
    source, target = pair_of(fields.record) or PAIRS[0]
    if isinstance(fields.record.get(source), list):
        return (_prompted(fields, source, target),)
    turns = (*opening_of(fields), Turn("user", fields.text(source), False), answer_of(fields.text(target)))
    return (Conversation(turns=turns, where=fields.where, style="plain"),)


def _prompted(fields: Fields, source: str, target: str) -> Conversation:
    """Turns that are given, and those that are learned, or the text of one."""
    given, unused = turns_of(fields, source)
    if isinstance(fields.record.get(target), list):
        learned, more = turns_of(fields, target)
    else:
        learned, more = (answer_of(fields.text(target)),), ()
    turns = (*(replace(turn, learn=False) for turn in given), *learned)
    return Conversation(turns=with_system(fields, turns), where=fields.where, unused=(*unused, *more))


def _oasst(fields: Fields) -> tuple[Conversation, ...]:
    source, target = pair_of(fields.record) or PAIRS[0]
    prompt, answer = fields.text(source), fields.text(target)
    style, gap = look_of((prompt,))
    turns = (Turn("user", prompt, False), answer_of(answer))
    return (Conversation(turns=turns, where=fields.where, style=style, gap=gap, verbatim=True),)


def _plain(fields: Fields) -> tuple[Conversation, ...]:
    text = fields.text("text")
    style, gap = look_of((text,))
    return (Conversation(turns=(answer_of(text),), where=fields.where, style=style, gap=gap, verbatim=True),)


def _sharegpt(fields: Fields) -> tuple[Conversation, ...]:
    return (_dialogue(fields, *SHARED),)


def _messages(fields: Fields) -> tuple[Conversation, ...]:
    return (_dialogue(fields, *MESSAGES),)


def _dialogue(fields: Fields, *holders: str) -> Conversation:
    read, unused = turns_of(fields, holder_of(fields.record, *holders) or holders[0])
    turns, where = with_system(fields, read), fields.where
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{where}: {len(turns)} turns, none of them the assistant's, so there is nothing to learn")
    return Conversation(turns=turns, where=where, unused=unused)


def _is_transcript(source: object) -> bool:
    return isinstance(source, str) and HUMAN in source and ASSISTANT in source


_READERS: dict[str, Callable[[Fields], tuple[Conversation, ...]]] = {
    "alpaca": _alpaca,
    "input-output": _input_output,
    "oasst": _oasst,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "self-instruct": _self_instruct,
    "text": _plain,
}
FORMATS = tuple(_READERS)


_NAMED = 3


class BadRecords:
    """Counts errors and keeps the first three."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[DataError] = []

    @property
    def first(self) -> tuple[DataError, ...]:
        """The errors that are kept."""
        return tuple(self._first)

    def add(self, error: DataError) -> None:
        """Count a record that cannot be used."""
        self.extend(1, (error,))

    def extend(self, count: int, first: Iterable[DataError]) -> None:
        """Count records that follow, of which these are the first errors."""
        self.count += count
        self._first = [*self._first, *first][:_NAMED]

    def raise_any(self, total: int, *, what: str = "records", allowed: int = 0) -> None:
        """Raise DataError where there were more than are allowed: the one error, or how many and the first three.

        total: records of the pass, the bad ones included. allowed: `data.skip_bad`.
        """
        if self.count <= allowed:
            return
        if self.count == 1:
            raise self._first[0]
        more = f", and data.skip_bad={allowed:,} leaves out no more than that" if allowed else ""
        lines = [f"{self.count:,} of {total:,} {what} cannot be used{more}", *(error.message for error in self._first)]
        if self.count > len(self._first):
            lines.append(f"and {self.count - len(self._first):,} more")
        raise DataError("\n  ".join(lines), try_=next((error.try_ for error in self._first if error.try_), ""))

    def notes(self, total: int) -> tuple[str, ...]:
        """What was left out, and the first three reasons; empty if nothing was."""
        if not self.count:
            return ()
        reasons = "; ".join(error.message for error in self._first)
        more = f"; and {self.count - len(self._first):,} more" if self.count > len(self._first) else ""
        return (f"{self.count:,} of {total:,} records cannot be used and were left out: {reasons}{more}",)
