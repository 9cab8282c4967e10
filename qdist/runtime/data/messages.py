"""What does a chat template get of a conversation? Messages as transformers' own users hand them over."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from qdist.core.data.conversation import THOUGHT_KEYS, Conversation, Turn
from qdist.core.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Template(NamedTuple):
    """What a chat template's source shows of how it reads messages."""

    source: str

    @property
    def thought_keys(self) -> tuple[str, ...]:
        """Keys of a message under which it reads reasoning; empty if it knows only that within the content."""
        return tuple(key for key in THOUGHT_KEYS if re.search(rf"\b{key}\b", self.source))

    @property
    def marks_answers(self) -> bool:
        """Whether it marks what a model writes, by `{% generation %}`."""
        return bool(_GENERATION.search(self.source))


def template_of(tokenizer: Any, conversation: Conversation) -> Template:
    """The template that transformers takes for a conversation: of several, the one called tool_use if it has tools."""
    return Template(tokenizer.get_chat_template(None, tools_of(conversation)))


def tools_of(conversation: Conversation) -> list[dict[str, Any]] | None:
    """Tools as apply_chat_template takes them; None without any, which templates tell from an empty list."""
    return list(conversation.tools) or None


def readable_turns(conversation: Conversation, template: Template) -> tuple[Turn, ...]:
    """The turns, with reasoning as a part of the text if the template reads it nowhere else."""
    if template.thought_keys:
        return conversation.turns
    return tuple(with_thoughts_in_text(turn) for turn in conversation.turns)


def with_thoughts_in_text(turn: Turn) -> Turn:
    """A turn with its reasoning before its text, between the tags that most models think in."""
    return replace(turn, text=turn.answered, thoughts="") if turn.thoughts else turn


def messages_of(turns: Sequence[Turn], template: Template, *, as_text: bool = False) -> list[dict[str, Any]]:
    """Messages of turns. Keys without a value are left out: many templates ask only whether a key is there.

    as_text: arguments of calls as JSON text rather than as an object.
    """
    return [_message(turn, template, as_text=as_text) for turn in turns]


def readable_messages(
    turns: Sequence[Turn], template: Template, write: Callable[[list[dict[str, Any]]], str]
) -> list[dict[str, Any]]:
    """Messages with arguments of calls as an object; as text, if the template wants that or would print Python's.

    write: renders messages, and raises DataError where the template refuses them.
    """
    objects, texts = messages_of(turns, template), messages_of(turns, template, as_text=True)
    if not any(turn.calls for turn in turns):
        return objects
    try:
        if not _writes_python(turns, write(objects)):
            return objects
    except DataError:
        try:
            write(texts)
        except DataError:
            return objects  # whose refusal is the one to tell
    return texts


def _message(turn: Turn, template: Template, *, as_text: bool) -> dict[str, Any]:
    own: dict[str, Any] = {"role": turn.role, "content": turn.said}
    if turn.thoughts:
        own |= dict.fromkeys(template.thought_keys, turn.thoughts)
    if turn.calls:
        own["tool_calls"] = [_with_text(call) if as_text else call for call in turn.calls]
    if turn.extra:
        own |= {"instruction": turn.text, "input": turn.extra}
    if turn.tool:
        own["name"] = turn.tool
    if turn.call_id:
        own["tool_call_id"] = turn.call_id
    return own


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _writes_python(turns: Sequence[Turn], text: str) -> bool:
    """Whether arguments of a call stand in a text as Python prints an object, and not as JSON."""
    given = [call["function"]["arguments"] for turn in turns for call in turn.calls]
    return any(str(own) in text and str(own) not in _forms(own) for own in given)


def missing_of_call(call: Mapping[str, Any], text: str) -> str:
    """The first of a call's name, and its arguments' names and values, that a text does not hold; empty if all are."""
    function = call["function"]
    parts = (function["name"], *_parts(function["arguments"]))
    return next((str(part) for part in parts if not is_written(part, text)), "")


def is_written(value: object, text: str) -> bool:
    """Whether a value stands in a text, as it is or as JSON or Python write it, and not as a part of a word."""
    return any(re.search(_apart(form), text) for form in _forms(value))


def _apart(form: str) -> str:
    before, after = r"(?<!\w)" if form[:1].isalnum() else "", r"(?!\w)" if form[-1:].isalnum() else ""
    return f"{before}{re.escape(form)}{after}"


def _parts(arguments: object) -> Iterator[object]:
    """Names and plain values within an object."""
    if isinstance(arguments, Mapping):
        for key, value in arguments.items():
            yield key
            yield from _parts(value)
    elif isinstance(arguments, list | tuple):
        for value in arguments:
            yield from _parts(value)
    else:
        yield arguments


def _forms(value: object) -> tuple[str, ...]:
    texts = json.dumps(value), json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        return (value.strip(), *(text[1:-1] for text in texts))
    return (*texts, *(() if isinstance(value, Mapping) else (str(value),)))
