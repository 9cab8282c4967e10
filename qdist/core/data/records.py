"""Which conversation does a raw record hold, and which turns are learned? Or what is wrong with it?"""

import json
import re
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from qdist.core.data.columns import columns_in, renamed
from qdist.core.data.conversation import ASSISTANT, HUMAN, Conversation, Style, Turn
from qdist.core.data.preferences import is_preference, preferred, verdict_key
from qdist.core.data.reading import AS_FOUND, Reading
from qdist.core.data.record_fields import PAIRS, Fields, Record, found_in, items_of, mark_of, pair_of
from qdist.core.data.record_turns import (
    MESSAGES,
    SHARED,
    answer_of,
    holder_of,
    opening_of,
    speakers_with,
    thoughts_of,
    turns_of,
    whose,
    with_system,
)
from qdist.core.data.tool_calls import tools_of
from qdist.core.data.transcripts import is_tagged, turns_in
from qdist.core.errors import DataError, nearest

_ASKING = ("prompt", "instruction", "question", "text", "input", "query", "problem", "inputs")
_HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: JSON can express it, and a terminal yields it for bytes that are not UTF-8."""


def conversations(record: Record, *, where: str, reading: Reading = AS_FOUND) -> tuple[Conversation, ...]:
    """The conversations that `record` holds: one, or for Self-Instruct one an instance.

    reading: its format, if not told from the keys, and names of columns and roles.

    Raises DataError, naming `where`, what is missing and which keys were found.
    """
    if reading.format is not None:
        check_format(reading.format)
    fields = _fields(record, where, reading)
    name = reading.format or _detected(fields.record, reading, where)
    marked = mark_of(fields)
    found = tuple(replace(own, format=name) for own in _READERS[name](fields))
    tools = () if any(own.verbatim for own in found) else tools_of(fields)
    unused = fields.unused()
    found = tuple(replace(own, tools=tools, unused=(*own.unused, *unused)) for own in found)
    for own in found:
        require_whole_characters(own)
    return tuple(map(_context, found)) if marked is False else found


def _fields(record: Record, where: str, reading: Reading) -> Fields:
    return Fields(renamed(record, reading.columns, where), where, speakers_with(reading.roles))


def _context(conversation: Conversation) -> Conversation:
    """A conversation of which nothing is learned."""
    return replace(conversation, turns=tuple(replace(turn, learn=False) for turn in conversation.turns))


def check_format(name: str) -> None:
    """Raise DataError when `name` is not a known record format."""
    if name not in _READERS:
        close = nearest(name, FORMATS)
        raise DataError(f"{name!r} is not a record format", try_=close or ", ".join(FORMATS))


def detect(record: Record, *, where: str) -> str:
    """The name of the format that the keys of `record` show. Raises DataError when they show none."""
    if name := _shown(record):
        return name
    wanted = (
        "messages, conversations, instruction + output, input + output, prompt + completion, question + answer, "
        "prompt + chosen, text"
    )
    raise DataError(
        f"{where}: keys {found_in(record)} fit no known record format",
        try_=f"records with {wanted}, or data.columns to name theirs",
    )


def _detected(record: Record, reading: Reading, where: str) -> str:
    """The format that the renamed columns show by themselves, else that of the whole record."""
    named = {key: record[key] for key in reading.columns if key in record}
    return (_shown(named) if named else None) or detect(record, where=where)


def _shown(record: Record) -> str | None:
    there = {key for key, value in record.items() if value is not None}  # tables have all columns in all records
    if is_preference(record):
        return "preference"
    if holder := holder_of(record, *MESSAGES, *SHARED):
        return "messages" if holder in MESSAGES else "sharegpt"
    for key, name in (("instances", "self-instruct"), ("instruction", "alpaca")):
        if key in there:
            return name
    if pair := pair_of(record):
        return "oasst" if _is_transcript(record[pair[0]]) else "input-output"
    if "text" in there:
        return "transcript" if is_tagged(record["text"]) else "text"
    return None


def asked(record: Record, *, where: str, reading: Reading = AS_FOUND) -> Conversation:
    """What a prompt asks: `messages` or `conversations` that wait for a reply, `prompt`, `instruction`, `question`...

    reading: names of columns, of which a prompt may lack any, and roles.

    Raises DataError as `conversations` does, and for one that waits for nothing.
    """
    fields = _fields(record, where, replace(reading, columns=columns_in(record, reading.columns)))
    if holder := holder_of(fields.record, *MESSAGES, *SHARED, "prompt"):
        turns = with_system(fields, turns_of(fields, holder))
    elif key := fields.has(*_ASKING):
        extra = fields.optional_text("input", "context") if key == "instruction" else ""
        turns = (*opening_of(fields), Turn("user", fields.text(key), False, extra))
    else:
        raise DataError(
            f"{where}: neither 'prompt' nor 'messages' with role and content; keys found: {found_in(fields.record)}",
            try_='{"prompt": "..."}',
        )
    if turns[-1].role not in ("user", "tool"):
        raise DataError(
            f"{where}: the last turn is {whose(turns[-1].role)}, so nothing is left to answer",
            try_="a conversation that ends with the user's turn, or with what a tool returned",
        )
    verbatim = len(turns) == 1 and _is_transcript(turns[0].text)
    tools = () if verbatim else tools_of(fields)
    context = _context(Conversation(turns=turns, where=where, verbatim=verbatim, tools=tools))
    return replace(context, unused=fields.unused())


def require_whole_characters(conversation: Conversation) -> None:
    """Raise DataError for text that no tokenizer accepts."""
    texts = [text for turn in conversation.turns for text in (turn.said, turn.thoughts, turn.tool) if text]
    of_tools = [*conversation.tools, *(call for turn in conversation.turns for call in turn.calls)]
    texts += [json.dumps(each, ensure_ascii=False) for each in of_tools]
    for text in texts:
        if half := _HALF.search(text):
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
        instance = fields.inside(item, f"{fields.where}, instance {number}")
        found.append(_instructed(fields, instance))
        fields.close("instances", instance)
    return tuple(found)


def _instructed(head: Fields, instance: Fields) -> Conversation:
    """An instruction with the input and output of one instance of it, after what was said before."""
    instruction = head.text("instruction")
    answer = answer_of(instance.text("output", "response"), thoughts=thoughts_of(instance))
    extra = instance.optional_text("input", "context")
    turns = (*opening_of(head), Turn("user", instruction, False, extra), answer)
    return Conversation(turns=turns, where=instance.where, style="alpaca")


def _input_output(fields: Fields) -> tuple[Conversation, ...]:
    source, target = pair_of(fields.record) or PAIRS[0]
    if any(isinstance(fields.record.get(key), list) for key in (source, target)):
        return (_prompted(fields, source, target),)
    answer = answer_of(fields.text(target), thoughts=thoughts_of(fields))
    turns = (*opening_of(fields), Turn("user", fields.text(source), False), answer)
    return (Conversation(turns=turns, where=fields.where, style="plain"),)


def _prompted(fields: Fields, source: str, target: str) -> Conversation:
    """What is given and what is learned, of which one at least is a list of turns, and the other may be a text."""
    given: tuple[Turn, ...]
    if isinstance(fields.record.get(source), list):
        given = tuple(replace(turn, learn=False) for turn in turns_of(fields, source))
    else:
        given = (*opening_of(fields), Turn("user", fields.text(source), False))
    if isinstance(fields.record.get(target), list):
        learned = turns_of(fields, target)
    else:
        learned = (answer_of(fields.text(target), thoughts=thoughts_of(fields)),)
    return Conversation(turns=with_system(fields, (*given, *learned)), where=fields.where)


def _preference(fields: Fields) -> tuple[Conversation, ...]:
    """The chosen answer, or a pair or conversation whose label says whether it is a good one."""
    if fields.record.get("chosen") is not None:
        return (preferred(fields),)
    key = verdict_key(fields.record)
    if key is None:
        raise DataError(
            f"{fields.where}: 'chosen' is missing; keys found: {found_in(fields.record)}",
            try_="records with 'prompt' and 'chosen', or 'prompt', 'completion' and a 'label' of true or false",
        )
    bare = {name: value for name, value in fields.record.items() if name != key}
    found = _READERS[detect(bare, where=fields.where)](fields)
    return found if fields.value(key) else tuple(map(_context, found))


def _transcript(fields: Fields) -> tuple[Conversation, ...]:
    turns = turns_in(fields.text("text"))
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(
            f"{fields.where}: 'text' has no turn marked by '<bot>:' or 'Assistant:'", try_="--set format=text"
        )
    return (Conversation(turns=with_system(fields, turns), where=fields.where),)


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
    turns = turns_of(fields, holder_of(fields.record, *SHARED) or SHARED[0])
    asks = next((at for at, turn in enumerate(turns) if turn.role != "assistant"), 0)
    own = _dialogue(fields, turns[asks:])
    return (replace(own, notes=(UNASKED,)) if asks else own,)


def _messages(fields: Fields) -> tuple[Conversation, ...]:
    return (_dialogue(fields, turns_of(fields, holder_of(fields.record, *MESSAGES) or MESSAGES[0])),)


def _dialogue(fields: Fields, read: tuple[Turn, ...]) -> Conversation:
    turns, where = with_system(fields, read), fields.where
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{where}: {len(turns)} turns, none of them the assistant's, so there is nothing to learn")
    return Conversation(turns=turns, where=where)


def _is_transcript(source: object) -> bool:
    return isinstance(source, str) and HUMAN in source and ASSISTANT in source


_READERS: dict[str, Callable[[Fields], tuple[Conversation, ...]]] = {
    "alpaca": _alpaca,
    "input-output": _input_output,
    "oasst": _oasst,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "self-instruct": _self_instruct,
    "preference": _preference,
    "transcript": _transcript,
    "text": _plain,
}
FORMATS = tuple(_READERS)
UNASKED = "answers that a conversation begins with are left out, as nothing asks for them"
"""The note of a ShareGPT conversation that begins with an answer: long ones were cut anywhere, as FastChat knew."""


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
