"""Which turns does a record hold: who speaks, with what words, thoughts and calls, and which are learned?"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, cast

from msgspec.structs import replace

from qdist.core.data.conversation import THOUGHT, THOUGHT_END, THOUGHT_KEYS, Role, Turn
from qdist.core.data.record_fields import (
    CALLS,
    SYSTEM,
    Fields,
    Record,
    is_empty,
    items_of,
    kind_of,
    mark_of,
    pair_of,
    says_something,
)
from qdist.core.data.tool_calls import Call, calls_in, calls_of, name_of
from qdist.core.errors import DataError, SpecError, nearest

Speaker = Role | Literal["function_call"]
"""Who says a turn; function_call is the assistant, in a turn that is nothing but calls."""

MESSAGES, SHARED = ("messages",), ("conversations", "conversation", "dialog", "dialogue")
"""Keys of a list of turns."""
SPEAKERS: dict[str, Speaker] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "ai": "assistant", "bing": "assistant", "bard": "assistant",
    "tool": "tool", "tools": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
    "tool_response": "tool", "tool_result": "tool", "function_response": "tool",
    "function_call": "function_call", "tool_call": "function_call", "tool_calls": "function_call",
}  # fmt: skip
"""Names that turns are said by, in lower case."""
_SPEAKER, _WORDS = ("role", "from"), ("content", "value", "text")
_TEXTS, _REASONS = ("text", "input_text", "output_text"), ("thinking", "reasoning")
_MEDIA = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file")
"""Types of the parts of a content."""


def speakers_with(roles: Mapping[str, str]) -> Mapping[str, Speaker]:
    """`SPEAKERS` with the data's own names. roles: the data's names by ours.

    Raises SpecError for a role that is not ours.
    """
    if not roles:
        return SPEAKERS
    for ours, theirs in roles.items():
        if ours not in SPEAKERS:
            known = ("system", "user", "assistant", "tool", "function_call")
            raise SpecError(
                f"data.roles names {ours!r}, which is none of {', '.join(known)}",
                try_=f"--set data.roles={nearest(ours, known) or 'user'}={theirs}",
            )
    return {**SPEAKERS, **{theirs.strip().lower(): SPEAKERS[ours] for ours, theirs in roles.items()}}


def holder_of(record: Record, *keys: str) -> str | None:
    """The key of the list of turns: one that has some, else one that should."""
    lists = sorted((key for key in keys if isinstance(record.get(key), list)), key=lambda key: not record[key])
    meant = [key for key in (*MESSAGES, SHARED[0]) if key in keys and record.get(key) is not None]
    return next(iter((*lists, *meant)), None)


def turns_of(fields: Fields, holder: str) -> tuple[Turn, ...]:
    """The turns in a list. Raises DataError, naming the turn, for one that cannot be read."""
    texts = fields.record.get(holder)
    if holder not in MESSAGES and isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        fields.value(holder)
        return tuple(answer_of(text) if at % 2 else Turn("user", text, False) for at, text in enumerate(texts))
    items = [fields.inside(item, f"{fields.where}, turn {number}") for number, item in items_of(fields, holder)]
    turns = [turn for item in items for turn in ((turn_of(item),) if item.has(*_SPEAKER) else _exchange(item))]
    for item in items:
        fields.close(holder, item)
    return tuple(_named(turns))


def _named(turns: Iterable[Turn]) -> Iterator[Turn]:
    """Turns with the names of the tools that results are of: those of their calls, by id, else in order."""
    waiting = list[Call]()
    for turn in turns:
        if turn.role != "tool":
            waiting = list(turn.calls)
        elif waiting:
            answered = next((call for call in waiting if turn.call_id and call.get("id") == turn.call_id), None)
            if answered or not turn.call_id:
                answered = answered or waiting[0]
                waiting.remove(answered)
                turn = replace(turn, tool=turn.tool or name_of(answered))
        yield turn


def with_system(fields: Fields, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Turns that begin with what asks, behind the system message that stands beside them."""
    if turns[0].role in ("assistant", "tool"):
        raise DataError(
            f"{fields.where}: the first turn is {whose(turns[0].role)}, so nothing asks for it", try_="remove that turn"
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
        return (turn_of(fields),)  # which says what is missing
    answer = answer_of(fields.text(pair[1]), mark_of(fields), thoughts=thoughts_of(fields))
    return (*opening_of(fields), Turn("user", fields.text(pair[0]), False), answer)


def turn_of(fields: Fields) -> Turn:
    """One turn. Raises DataError, naming the key, for one that cannot be read."""
    speaker, mark = _speaker(fields), mark_of(fields)
    if speaker in ("assistant", "function_call"):
        return (_called if speaker == "function_call" else _answered)(fields, mark)
    role = cast(Role, speaker)
    if mark:
        raise DataError(
            f"{fields.where} is {whose(role)} and is marked to be learned; the loss is taken on the assistant's turns",
            try_="remove the mark, or train on everything: --set train.train_on_source=true",
        )
    there = [key for key in (*CALLS, *THOUGHT_KEYS) if key in fields.record]
    if key := next((key for key in there if says_something(fields.record[key])), None):
        raise DataError(f"{fields.where} is {whose(role)} and has {key!r}", try_=f"{key!r} in the assistant's turns")
    if role == "tool":
        name, call_id = fields.optional_text("name", "tool_name"), fields.optional_text("tool_call_id")
        return Turn("tool", _result(fields), False, tool=name, call_id=call_id)
    text, thoughts = _words(fields)
    if thoughts:
        raise DataError(
            f"{fields.where} is {whose(role)} and holds reasoning", try_="reasoning in the assistant's turns"
        )
    return Turn(role, text, False)


def _speaker(fields: Fields) -> str:
    said_by = fields.text(*_SPEAKER)
    name = said_by.strip().lower()
    if name not in fields.speakers:
        known = ", ".join(name for name in fields.speakers if name not in ("tools", "tool_calls"))
        raise DataError(
            f"{fields.where}: {fields.chosen(*_SPEAKER)!r} is {said_by!r}",
            try_=f"--set data.roles=user={said_by.strip()} if that is the user, else one of {known}",
        )
    return fields.speakers[name]


def _answered(fields: Fields, mark: bool | None) -> Turn:
    """The assistant's turn: its thoughts, its text and its calls, each of which may be all that there is."""
    calls, beside, key = calls_of(fields), thoughts_of(fields), fields.chosen(*_WORDS)
    silent = key is None or is_empty(fields.record[key])
    text, inside = ("", "") if silent and (calls or beside) else _words(fields)
    if beside and (inside or text.lstrip().startswith(THOUGHT)):
        raise DataError(f"{fields.where} has reasoning beside the content and in it", try_="one of the two")
    return answer_of(text, mark, thoughts=beside or inside, calls=calls)


def _called(fields: Fields, mark: bool | None) -> Turn:
    """ShareGPT's turn of calls: JSON, behind the reasoning if there is any."""
    if calls := calls_of(fields):
        return answer_of("", mark, thoughts=thoughts_of(fields), calls=calls)
    key, value, thoughts = str(fields.chosen(*_WORDS)), fields.value(*_WORDS), thoughts_of(fields)
    if isinstance(value, str) and value.lstrip().startswith(THOUGHT) and THOUGHT_END in value and not thoughts:
        inside, _, value = value.lstrip().removeprefix(THOUGHT).partition(THOUGHT_END)
        thoughts = inside.strip()
    return answer_of("", mark, thoughts=thoughts, calls=calls_in(fields, key, value))


def thoughts_of(fields: Fields) -> str:
    """The reasoning beside an answer; empty if there is none."""
    return fields.optional_text(*THOUGHT_KEYS)


def _words(fields: Fields) -> tuple[str, str]:
    """The text of a turn, and the reasoning in it; for a list of parts, their texts concatenated."""
    value = fields.value(*_WORDS)
    if not isinstance(value, list):
        return fields.text(*_WORDS), ""
    key, said, thought = str(fields.chosen(*_WORDS)), list[str](), list[str]()
    for part in value:
        kind, text = _part(fields, key, part)
        if kind in _REASONS and any(said):
            raise DataError(f"{fields.where} holds reasoning behind text", try_="reasoning before the text")
        (thought if kind in _REASONS else said).append(text)
    return "".join(said), "".join(thought)


def _part(fields: Fields, key: str, part: object) -> tuple[str, str]:
    """Type and text of a part of a turn's content."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, Mapping):
        raise DataError(
            f"{fields.where}: a part of the content is {kind_of(part)}", try_='{"type": "text", "text": "..."}'
        )
    kind = str(part.get("type") or "text")
    inner = fields.inside(part, f"{fields.where}, a part of type {kind!r}")
    if kind not in (*_TEXTS, *_REASONS) or (kind in _TEXTS and not isinstance(part.get("text"), str)):
        raise DataError(
            f"{fields.where} holds a part of type {kind!r}, and only text is trained", try_="records of text"
        )
    inner.optional("type")
    text = inner.text("text") if kind in _TEXTS else _reason(inner, kind)
    fields.close(key, inner)
    return kind, text


def _reason(part: Fields, kind: str) -> str:
    """The text of a part of reasoning, which may be a list of parts itself, as Mistral has it."""
    value = part.value(kind, "text")
    key = str(part.chosen(kind, "text"))
    return "".join(_part(part, key, each)[1] for each in value) if isinstance(value, list) else part.text(kind, "text")


def _result(fields: Fields) -> str:
    """What a tool returned: text, parts of text, or any JSON value as text."""
    value = fields.value(*_WORDS)
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and value and all(_is_part(each) for each in value):
        return _words(fields)[0]
    return json.dumps(value, ensure_ascii=False)


def _is_part(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("type") in (*_TEXTS, *_MEDIA)


def answer_of(text: str, mark: bool | None = None, *, thoughts: str = "", calls: tuple[Call, ...] = ()) -> Turn:
    """The answer's turn, learned unless marked otherwise; an empty answer is not learned."""
    turn = Turn("assistant", text, False, thoughts=thoughts, calls=calls)
    return replace(turn, learn=mark is not False and not turn.is_empty)


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


def whose(role: Role) -> str:
    """'the user's', 'the assistant's'."""
    return f"the {role}'s"


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= 24 else f"{text[:24]}...", ensure_ascii=False)
