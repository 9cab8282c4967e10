"""What a raw record says: a conversation, and which of its turns are learned."""

import json
import re
from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from qdist.core.conversation import ASSISTANT, HUMAN, Conversation, Role, Style, Turn
from qdist.core.errors import DataError, nearest
from qdist.core.record_fields import (
    OF_TOOLS,
    SYSTEM,
    Fields,
    Record,
    found_in,
    is_empty,
    items_of,
    kind_of,
    mark_of,
    says_something,
)

_PAIRS = (
    ("input", "output"), ("prompt", "completion"), ("question", "answer"), ("prompt", "response"),
    ("question", "response"), ("query", "response"), ("query", "answer"), ("problem", "solution"),
    ("question", "solution"), ("inputs", "targets"), ("prompt", "output"), ("prompt", "answer"),
)  # fmt: skip
_ASKING = ("prompt", "instruction", "question", "text", "input", "query", "problem", "inputs")
_MESSAGES, _SHARED = ("messages",), ("conversations", "conversation", "dialog", "dialogue")
"""Keys of a list of turns."""
_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "ai": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip
_TOOLS = frozenset(("tool", "tools", "function", "function_call", "tool_call", "observation", "ipython"))
"""Roles of those that a model calls."""
_SPEAKER, _WORDS = ("role", "from"), ("content", "value", "text")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_HALF = re.compile("[\ud800-\udfff]")
"""Of a surrogate pair: JSON can say it, and a terminal gives it for what is not UTF-8."""


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
    if holder := _holder(record, *_MESSAGES, *_SHARED):
        return "messages" if holder in _MESSAGES else "sharegpt"
    for key, name in (("instances", "self-instruct"), ("instruction", "alpaca")):
        if key in there:
            return name
    if pair := _pair(record):
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
    if holder := _holder(record, *_MESSAGES, *_SHARED, "prompt"):
        turns = _talk(fields, _turns(fields, holder)[0])
    elif key := fields.has(*_ASKING):
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


def require_whole_characters(conversation: Conversation) -> None:
    """Raise DataError for text that no tokenizer takes."""
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
    turns = (*_opening(head), Turn("user", instruction, False, extra), _answer(answer))
    return Conversation(turns=turns, where=instance.where, style="alpaca")


def _input_output(fields: Fields) -> tuple[Conversation, ...]:
    source, target = _pair(fields.record) or _PAIRS[0]
    if isinstance(fields.record.get(source), list):
        return (_prompted(fields, source, target),)
    turns = (*_opening(fields), Turn("user", fields.text(source), False), _answer(fields.text(target)))
    return (Conversation(turns=turns, where=fields.where, style="plain"),)


def _prompted(fields: Fields, source: str, target: str) -> Conversation:
    """Turns that are given, and those that are learned, or the text of one."""
    given, unused = _turns(fields, source)
    if isinstance(fields.record.get(target), list):
        learned, more = _turns(fields, target)
    else:
        learned, more = (_answer(fields.text(target)),), ()
    turns = (*(replace(turn, learn=False) for turn in given), *learned)
    return Conversation(turns=_talk(fields, turns), where=fields.where, unused=(*unused, *more))


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
    return (_dialogue(fields, *_SHARED),)


def _messages(fields: Fields) -> tuple[Conversation, ...]:
    return (_dialogue(fields, *_MESSAGES),)


def _dialogue(fields: Fields, *holders: str) -> Conversation:
    read, unused = _turns(fields, _holder(fields.record, *holders) or holders[0])
    turns, where = _talk(fields, read), fields.where
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{where}: {len(turns)} turns, none of them the assistant's, so there is nothing to learn")
    return Conversation(turns=turns, where=where, unused=unused)


def _holder(record: Record, *keys: str) -> str | None:
    """The key of a list of turns: of one that has some, else of one that should."""
    lists = sorted((key for key in keys if isinstance(record.get(key), list)), key=lambda key: not record[key])
    meant = [key for key in (*_MESSAGES, _SHARED[0]) if key in keys and record.get(key) is not None]
    return next(iter((*lists, *meant)), None)


def _turns(fields: Fields, holder: str) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The turns in a list, and the keys of them that nothing was made of."""
    texts = fields.record.get(holder)
    if holder not in _MESSAGES and isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        fields.value(holder)
        return tuple(_answer(text) if at % 2 else Turn("user", text, False) for at, text in enumerate(texts)), ()
    items = [Fields(item, f"{fields.where}, turn {number}") for number, item in items_of(fields, holder)]
    turns = tuple(turn for item in items for turn in ((_turn(item),) if item.has(*_SPEAKER) else _exchange(item)))
    unused = dict.fromkeys(f"{holder}.{key}" for item in items for key in item.unused())
    return turns, tuple(unused)


def _talk(fields: Fields, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
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
    pair = _pair(fields.record)
    if pair is None:
        return (_turn(fields),)  # which says what is missing
    answer = _answer(fields.text(pair[1]), mark_of(fields))
    return (*_opening(fields), Turn("user", fields.text(pair[0]), False), answer)


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
            f"{fields.where} is {_whose(role)} and is marked to be learned; the loss is taken on the assistant's turns",
            try_="remove the mark, or train on everything: --set train.train_on_source=true",
        )
    if thought := next((key for key in _THOUGHTS if not is_empty(fields.record.get(key))), None):
        raise DataError(
            f"{fields.where} has {thought!r}, and reasoning is trained where it is part of the content",
            try_="content of <think>, the reasoning, </think> and the answer",
        )
    return _answer(text, mark) if role == "assistant" else Turn(role, text, False)


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


def _answer(text: str, mark: bool | None = None) -> Turn:
    """Learned unless it is marked not to be; silence is nothing to learn."""
    return Turn("assistant", text, mark is not False and bool(text.strip()))


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


def _pair(record: Record) -> tuple[str, str] | None:
    """The keys of what asks and what answers: both with a value, else both there."""
    there = [pair for pair in _PAIRS if pair[0] in record and pair[1] in record]
    return next(iter(sorted(there, key=lambda pair: record[pair[0]] is None or record[pair[1]] is None)), None)


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
