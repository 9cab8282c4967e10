"""What a raw record says: a conversation, and which of its turns are learned."""

from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from qdist.core.errors import DataError, nearest

Role = Literal["system", "user", "assistant"]
Record = Mapping[str, object]

_PAIRS = (("input", "output"), ("prompt", "completion"), ("question", "answer"))
_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}

_ALPACA_HEAD = "Below is an instruction that describes a task"
_ALPACA_TAIL = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
"""The prompt of https://github.com/tatsu-lab/stanford_alpaca, `PROMPT_DICT` in train.py."""


class Turn(msgspec.Struct, frozen=True):
    """What one speaker says; the loss is taken on it when `learn`."""

    role: Role
    text: str
    learn: bool


class Segment(msgspec.Struct, frozen=True):
    """A piece of a conversation as plain text; `learn` pieces are followed by the end-of-text token."""

    text: str
    learn: bool


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """One training sample, before any tokenizer has seen it."""

    turns: tuple[Turn, ...]
    where: str
    """The file and line or record it came from, for messages."""
    prompt: str | None = None
    """What stands before the last turn without a chat template; None: the turns, each under a `###` heading."""
    verbatim: bool = False
    """The text is complete as it is: no chat template, even where the tokenizer has one."""

    def segments(self) -> tuple[Segment, ...]:
        """The text without a chat template, in pieces that are tokenized one by one (as QLoRA does).

        A conversation that ends with a user's turn gives the prompt that asks for the next reply.
        """
        if self.prompt is not None:
            return (Segment(self.prompt, False), Segment(self.turns[-1].text, True))
        return tuple(_segment(turn, first=index == 0) for index, turn in enumerate(self.turns))


def _segment(turn: Turn, *, first: bool) -> Segment:
    if turn.role == "assistant":
        return Segment(f" {turn.text}", turn.learn)
    if turn.role == "system":
        return Segment(f"{turn.text}\n", False)
    return Segment(f"{'' if first else chr(10)}### Human: {turn.text}\n### Assistant:", False)


def conversations(record: Record, *, where: str, data_format: str | None = None) -> tuple[Conversation, ...]:
    """The conversations that `record` holds: one, or for Self-Instruct one an instance.

    data_format: a name of `FORMATS`, or None to tell it from the keys.

    Raises DataError, naming `where`, what is missing and which keys were found.
    """
    if data_format is not None:
        check_format(data_format)
    return _READERS[data_format or detect(record, where=where)](record, where)


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
    raise DataError(f"{where}: keys {_found(record)} fit no known record format", try_=f"records with {wanted}")


def _alpaca(record: Record, where: str) -> tuple[Conversation, ...]:
    return (_instructed(record, record, where),)


def _self_instruct(record: Record, where: str) -> tuple[Conversation, ...]:
    instances = _items(record, "instances", where)
    return tuple(_instructed(record, instance, f"{where}, instance {number}") for number, instance in instances)


def _instructed(head: Record, instance: Record, where: str) -> Conversation:
    """An instruction with the input and output of one instance of it."""
    instruction, output = _text(head, "instruction", where), _text(instance, "output", where)
    extra = _text(instance, "input", where) if instance.get("input") is not None else ""
    user = f"{instruction}\n\n{extra}" if extra else instruction
    prompt = _alpaca_prompt(instruction, extra)
    return Conversation(turns=_exchange(user, output), where=where, prompt=prompt)


def _alpaca_prompt(instruction: str, extra: str) -> str:
    if not extra:
        return f"{_ALPACA_HEAD}. {_ALPACA_TAIL}{instruction}\n\n### Response:"
    paired = f"{_ALPACA_HEAD}, paired with an input that provides further context. {_ALPACA_TAIL}"
    return f"{paired}{instruction}\n\n### Input:\n{extra}\n\n### Response:"


def _input_output(record: Record, where: str) -> tuple[Conversation, ...]:
    source, target = _pair(record) or _PAIRS[0]
    user, answer = _text(record, source, where), _text(record, target, where)
    return (Conversation(turns=_exchange(user, answer), where=where, prompt=user),)


def _oasst(record: Record, where: str) -> tuple[Conversation, ...]:
    (pair,) = _input_output(record, where)
    return (msgspec.structs.replace(pair, verbatim=True),)


def _plain(record: Record, where: str) -> tuple[Conversation, ...]:
    turn = Turn("assistant", _text(record, "text", where), True)
    return (Conversation(turns=(turn,), where=where, prompt="", verbatim=True),)


def _sharegpt(record: Record, where: str) -> tuple[Conversation, ...]:
    return (_dialogue(record, where, holder="conversations", speaker="from", words="value"),)


def _messages(record: Record, where: str) -> tuple[Conversation, ...]:
    return (_dialogue(record, where, holder="messages", speaker="role", words="content"),)


def _dialogue(record: Record, where: str, *, holder: str, speaker: str, words: str) -> Conversation:
    turns = _turns(record, where, holder=holder, speaker=speaker, words=words)
    if not any(turn.learn for turn in turns):
        raise DataError(f"{where}: {len(turns)} turns, none of them the assistant's, so there is nothing to learn")
    return Conversation(turns=turns, where=where)


def asked(messages: list[dict[str, str]], *, where: str) -> Conversation:
    """Messages with role and content that wait for the next reply. Raises DataError as `conversations` does."""
    turns = _turns({"messages": messages}, where, holder="messages", speaker="role", words="content")
    return Conversation(turns=turns, where=where)


def _turns(record: Record, where: str, *, holder: str, speaker: str, words: str) -> tuple[Turn, ...]:
    turns = tuple(
        _turn(item, f"{where}, turn {number}", speaker=speaker, words=words)
        for number, item in _items(record, holder, where)
    )
    if turns[0].role == "assistant":
        raise DataError(f"{where}: the first turn is the assistant's, so nothing asks for it", try_="remove that turn")
    return turns


def _turn(item: Record, where: str, *, speaker: str, words: str) -> Turn:
    said_by = _text(item, speaker, where)
    if said_by not in _ROLES:
        raise DataError(f"{where}: {speaker!r} is {said_by!r}", try_=f"one of {', '.join(_ROLES)}")
    return Turn(_ROLES[said_by], _text(item, words, where), _ROLES[said_by] == "assistant")


def _exchange(user: str, assistant: str) -> tuple[Turn, Turn]:
    return Turn("user", user, False), Turn("assistant", assistant, True)


def _pair(record: Record) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if pair[0] in record and pair[1] in record), None)


def _is_transcript(source: object) -> bool:
    return isinstance(source, str) and "### Human:" in source and "### Assistant:" in source


def _items(record: Record, key: str, where: str) -> list[tuple[int, Record]]:
    """The objects listed under `key`, numbered from 1. Raises DataError when it is not a list of objects."""
    items = _value(record, key, where)
    if not isinstance(items, list) or not items:
        raise DataError(f"{where}: {key!r} must be a list with at least one object, not {_kind(items)}")
    for number, item in enumerate(items, 1):
        if not isinstance(item, Mapping):
            raise DataError(f"{where}: {key!r} item {number} must be an object, not {_kind(item)}")
    return list(enumerate(items, 1))


def _text(record: Record, key: str, where: str) -> str:
    value = _value(record, key, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be text, not {_kind(value)}")
    return value


def _value(record: Record, key: str, where: str) -> object:
    if key not in record:
        raise DataError(f"{where}: {key!r} is missing; keys found: {_found(record)}")
    return record[key]


def _kind(value: object) -> str:
    names = {type(None): "null", list: "a list", dict: "an object", bool: "true or false", int: "a number"}
    empty = isinstance(value, list) and not value
    return "an empty list" if empty else names.get(type(value), type(value).__name__)


def _found(record: Record) -> str:
    return ", ".join(record) or "none"


_READERS: dict[str, Callable[[Record, str], tuple[Conversation, ...]]] = {
    "alpaca": _alpaca,
    "input-output": _input_output,
    "oasst": _oasst,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "self-instruct": _self_instruct,
    "text": _plain,
}
FORMATS = tuple(_READERS)
