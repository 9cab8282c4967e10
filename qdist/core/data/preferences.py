"""What is learned of a record that says which answers were preferred?"""

from collections.abc import Mapping

from msgspec.structs import replace

from qdist.core.data.conversation import Conversation, Style, Turn
from qdist.core.data.record_fields import Fields, Record, found_in
from qdist.core.data.record_turns import (
    MESSAGES,
    SHARED,
    SPEAKERS,
    answer_of,
    holder_of,
    opening_of,
    turn_of,
    turns_of,
    with_system,
)
from qdist.core.data.transcripts import is_spoken, turns_in
from qdist.core.errors import DataError

_ASKED = ("prompt", "instruction", "question", "input", "query", "problem")
CHOSEN = "'chosen' is learned, and 'rejected' is not used"
"""The note of a record with both."""


def is_preference(record: Record) -> bool:
    """Whether a record has a chosen answer, or one that is labelled as good or bad.

    Turns that end with an answer already, with chosen and rejected ones beside them, are read as they are.
    """
    if record.get("chosen") is not None:
        return holder_of(record, *MESSAGES, *SHARED) is None or _context(record) is not None
    return verdict_key(record) is not None


def _context(record: Record) -> str | None:
    """The key of a list of turns that await an answer."""
    holder = holder_of(record, *MESSAGES, *SHARED, "prompt")
    turns = record.get(holder) if holder else None
    last = turns[-1] if isinstance(turns, list) and turns else None
    said_by = last.get("role", last.get("from")) if isinstance(last, Mapping) else None
    return None if SPEAKERS.get(str(said_by).lower()) == "assistant" else holder


def verdict_key(record: Record) -> str | None:
    """The key that says whether the answer is a good one: KTO's label, or LLaMA-Factory's name for it."""
    if isinstance(record.get("kto_tag"), bool):
        return "kto_tag"
    paired = record.get("prompt") is not None and record.get("completion") is not None
    return "label" if paired and isinstance(record.get("label"), bool) else None


def preferred(fields: Fields) -> Conversation:
    """The conversation that ends with the chosen answer.

    Of a prompt beside it nothing is learned; without one, all answers of the chosen conversation are.
    """
    given, style = _given(fields)
    turns = _beyond(given, _chosen(fields))
    if turns[-1].role != "assistant" or turns[0].role == "assistant":
        raise DataError(
            f"{fields.where}: 'chosen' is not an answer to anything; keys found: {found_in(fields.record)}",
            try_="'prompt' beside an answer, or 'chosen' that begins with what asks",
        )
    turns = with_system(fields, turns)
    fields.optional("rejected")
    told = (CHOSEN,) if fields.has("rejected") else ()
    return Conversation(turns=turns, where=fields.where, style=style, notes=told)


def _given(fields: Fields) -> tuple[tuple[Turn, ...], Style]:
    """What is asked beside the chosen answer, and how it would be written without a chat template."""
    holder, key = _context(fields.record), fields.chosen(*_ASKED)
    if holder:
        return tuple(replace(turn, learn=False) for turn in turns_of(fields, holder)), "headings"
    if key is None:
        return (), "headings"
    text = fields.text(key)
    if is_spoken(text):
        asked = tuple(replace(turn, learn=False) for turn in turns_in(text))
        return (asked[:-1] if asked[-1].is_empty else asked), "headings"
    extra = fields.optional_text("input", "context") if key == "instruction" else ""
    return (*opening_of(fields), Turn("user", text, False, extra)), "alpaca" if key == "instruction" else "plain"


def _chosen(fields: Fields) -> tuple[Turn, ...]:
    """The chosen answer: text, a turn, several, or a transcript that begins with what asks."""
    value = fields.value("chosen")
    if isinstance(value, Mapping):
        inner = fields.inside(value, f"{fields.where}, 'chosen'")
        turn = turn_of(inner)
        fields.close("chosen", inner)
        return (turn,)
    if isinstance(value, list):
        return turns_of(fields, "chosen")
    text = fields.text("chosen")
    return turns_in(text) if is_spoken(text) else (answer_of(text),)


def _beyond(given: tuple[Turn, ...], chosen: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The chosen turns behind those that are given, which they may repeat; nothing is learned of what is given."""
    said = [turn.said.strip() for turn in chosen]
    repeated = [at for at, text in enumerate(said) if text in {turn.said.strip() for turn in given}]
    if chosen[0].role == "assistant" or not all(turn.said.strip() in said for turn in given):
        return (*given, *chosen)
    until = max(repeated, default=-1)
    return tuple(replace(turn, learn=turn.learn and at > until) for at, turn in enumerate(chosen))
