"""What a raw record says: a conversation, and which of its turns are learned."""

import json
import re
from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from qdist.core.conversation import ASSISTANT, HUMAN, Conversation, Role, Style, Turn
from qdist.core.errors import DataError, nearest
from qdist.core.record_fields import (
    MARKS,
    OF_TOOLS,
    SYSTEM,
    Fields,
    Record,
    found_in,
    is_empty,
    items_of,
    kind_of,
    mark_of,
)

_PAIRS = (("input", "output"), ("prompt", "completion"), ("question", "answer"))
_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
}  # fmt: skip
_TOOLS = frozenset(("tool", "tools", "function", "function_call", "tool_call", "observation", "ipython"))
"""Roles of those that a model calls."""
_SPEAKER, _WORDS = ("role", "from"), ("content", "value")


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
    for key, name in (("messages", "messages"), ("conversations", "sharegpt"), ("instances", "self-instruct")):
        if key in record:
            return name
    if "instruction" in record:
        return "alpaca"
    if pair := _pair(record):
        return "oasst" if _is_transcript(record[pair[0]]) else "input-output"
    if "text" in record:
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
    if fields.has("messages", "conversations"):
        turns = _turns(fields, "messages", "conversations")
    elif key := fields.has("prompt", "instruction", "question", "text", "input"):
        extra = fields.optional_text("input", "context") if key == "instruction" else ""
        turns = (*_opening(fields), Turn("user", fields.text(key), False, extra))
    else:
        raise DataError(
            f"{where}: neither 'prompt' nor 'messages' with role and content; keys found: {found_in(record)}",
            try_='{"prompt": "..."}',
        )
    if turns[-1].role != "user":
        raise DataError(
            f"{where}: the last turn is {_whose(turns[-1].role)}, so nothing is left to answer",
            try_="a conversation that ends with the user's turn",
        )
    context = tuple(replace(turn, learn=False) for turn in turns)
    verbatim = len(turns) == 1 and _is_transcript(turns[0].text)
    return Conversation(turns=context, where=where, unused=fields.unused(), verbatim=verbatim)


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
    turns = (*_opening(head), Turn("user", instruction, False, extra), _answer(answer))
    return Conversation(turns=turns, where=instance.where, style="alpaca")


def _input_output(fields: Fields) -> tuple[Conversation, ...]:
    source, target = _pair(fields.record) or _PAIRS[0]
    turns = (*_opening(fields), Turn("user", fields.text(source), False), _answer(fields.text(target)))
    return (Conversation(turns=turns, where=fields.where, style="plain"),)


def _oasst(fields: Fields) -> tuple[Conversation, ...]:
    source, target = _pair(fields.record) or _PAIRS[0]
    prompt, answer = fields.text(source), fields.text(target)
    style, gap = look_of((prompt,))
    turns = (Turn("user", prompt, False), _answer(answer))
    return (Conversation(turns=turns, where=fields.where, style=style, gap=gap, verbatim=True),)


def _plain(fields: Fields) -> tuple[Conversation, ...]:
    text = fields.text("text")
    style, gap = look_of((text,))
    return (Conversation(turns=(_answer(text),), where=fields.where, style=style, gap=gap, verbatim=True),)


def _sharegpt(fields: Fields) -> tuple[Conversation, ...]:
    return (_dialogue(fields, "conversations"),)


def _messages(fields: Fields) -> tuple[Conversation, ...]:
    return (_dialogue(fields, "messages"),)


def _dialogue(fields: Fields, holder: str) -> Conversation:
    turns = _turns(fields, holder)
    where = fields.where
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{where}: {len(turns)} turns, none of them the assistant's, so there is nothing to learn")
    return Conversation(turns=turns, where=where, unused=_unused_of_turns(fields, holder))


def _turns(fields: Fields, *holders: str) -> tuple[Turn, ...]:
    items = items_of(fields, *holders)
    turns = tuple(_turn(Fields(item, f"{fields.where}, turn {number}")) for number, item in items)
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


def _turn(fields: Fields) -> Turn:
    said_by = fields.text(*_SPEAKER)
    name = said_by.strip().lower()
    calls = next((key for key in OF_TOOLS if not is_empty(fields.record.get(key))), None)
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
            f"{fields.where} is {_whose(role)} and is marked to be learned; the loss is taken on the assistant's turns",
            try_="remove the mark, or train on everything: --set train.train_on_source=true",
        )
    fields.unused()
    if role == "assistant":
        return _answer(text) if mark is not False else Turn("assistant", text, False)
    return Turn(role, text, False)


def _words(fields: Fields) -> str:
    """The text of a turn; of a list of parts, theirs one after the other."""
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


def _answer(text: str) -> Turn:
    """Silence is nothing to learn."""
    return Turn("assistant", text, bool(text.strip()))


def _opening(fields: Fields) -> tuple[Turn, ...]:
    """What stands beside an exchange and was said before it: a system message, and earlier exchanges."""
    system, history = fields.optional_text(*SYSTEM), fields.optional("history")
    turns = [Turn("system", system, False)] if system else []
    if history is None:
        return tuple(turns)
    if not isinstance(history, list) or not all(_is_exchange(pair) for pair in history):
        raise DataError(f"{fields.where}: 'history' must be a list of pairs", try_='[["question", "answer"], ...]')
    for question, answer in history:
        turns += [Turn("user", question, False), _answer(answer)]
    return tuple(turns)


def _is_exchange(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _unused_of_turns(fields: Fields, holder: str) -> tuple[str, ...]:
    known = {*_SPEAKER, *_WORDS, *MARKS, *OF_TOOLS}
    keys = {key: None for _, item in items_of(fields, holder) for key, value in item.items() if not is_empty(value)}
    return tuple(f"{holder}.{key}" for key in keys if key not in known)


def _pair(record: Record) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if pair[0] in record and pair[1] in record), None)


def _is_transcript(source: object) -> bool:
    return isinstance(source, str) and HUMAN in source and ASSISTANT in source


def _whose(role: Role) -> str:
    return f"the {role}'s"


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= 24 else f"{text[:24]}...", ensure_ascii=False)


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
