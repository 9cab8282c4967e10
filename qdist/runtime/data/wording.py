"""How records were worded, collected over a pass; and prompts written in the same way."""

from collections.abc import Hashable, Iterable, Iterator
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from qdist.core.data.conversation import HUMAN, THOUGHT_END, Conversation, Role, Style, Turn, Way, Wording, template_of
from qdist.core.data.templates import NamedTemplate, jinja_of
from qdist.core.errors import DataError, ModelError
from qdist.core.text import counted
from qdist.runtime.data.chat_template import prompt_text, require_template
from qdist.runtime.data.encode import Encoded, End, opening, prompt_of_segments

Key = TypeVar("Key", bound=Hashable)

_MARKED, _NEXT = "qdist-one-answer", "qdist-next-question"


class WordingCounts(msgspec.Struct):
    """What the records of a pass have in common, counted; keys are in the order of the first record that has them."""

    unused: dict[str, int] = {}
    """Records by keys of theirs that are not used."""
    formats: dict[str, int] = {}
    ways: dict[tuple[Way, str, bool], int] = {}
    """Records by style, gap, and whether they hold the whole text."""
    ends: dict[End, int] = {}
    leads: dict[str, int] = {}
    left_out: dict[Role, int] = {}
    notes: dict[str, int] = {}
    """Records by what is to be said of how they were read."""
    thoughts: int = 0
    doubled: int = 0
    toolless: int = 0
    """Records whose tools the chat template does not write."""
    apart: int = 0
    """Records that give several samples."""


class Told:
    """What the records of a pass have in common, and what to tell the user about their wording."""

    def __init__(self, tokenizer: Any, counts: WordingCounts | None = None) -> None:
        """counts: of earlier records."""
        self._tokenizer, self.counts = tokenizer, counts or WordingCounts()

    def add_unused(self, conversation: Conversation) -> None:
        """Count the keys of a record, used or not, that are not used."""
        count_up(self.counts.unused, conversation.unused)

    def add(self, conversation: Conversation, encoded: Encoded) -> None:
        """Count a record that is used."""
        counts = self.counts
        style: Way = "chat" if encoded.chat else conversation.style
        count_up(counts.formats, (conversation.format,))
        count_up(counts.notes, conversation.notes)
        count_up(counts.ways, ((style, "\n" if encoded.chat else conversation.gap, conversation.verbatim),))
        count_up(counts.ends, encoded.ends)
        count_up(counts.leads, encoded.leads)
        count_up(counts.left_out, sorted(encoded.left_out))
        counts.thoughts += encoded.thoughts
        counts.doubled += encoded.doubled
        counts.toolless += encoded.toolless
        counts.apart += len(encoded.samples) > 1

    def summed_up(self, records: int) -> tuple[Wording, tuple[str, ...]]:
        """The wording of most records, and notes."""
        counts = self.counts
        style, gap, raw = _by_number(counts.ways)[0]
        heading = HUMAN if raw and style == "headings" else ""
        ends, end_text = self._ends() if style == "chat" else ({self._tokenizer.eos_token_id}, heading)
        wording = Wording(
            format=", ".join(_by_number(counts.formats)),
            style=style,
            gap=gap,
            raw=raw,
            lead=self._lead(),
            ends=tuple(sorted(ends)),
            end_text=end_text,
        )
        return wording, tuple(self._notes(wording, records))

    def _lead(self) -> str:
        """What prompts have behind the header of an answer.

        Nothing, if answers begin in several ways and a model has to choose one: only a closed thought is no choice.
        """
        leads = self.counts.leads
        lead = _by_number(leads)[0] if leads else ""
        return lead if len(leads) == 1 or THOUGHT_END in lead else ""

    def _ends(self) -> tuple[set[int], str]:
        """Tokens that end answers, and the text that does if it is not a single token."""
        ends, text = {own.token for own in self.counts.ends if own.token is not None}, ""
        for own in _by_number(self.counts.ends):
            if own.token is None:
                text = text or own.mark or self._next_header()
        if self._is_unmarked():
            ends.add(self._tokenizer.eos_token_id)
        return ends, text

    def _is_unmarked(self) -> bool:
        """Whether answers end with only white space."""
        return any(not own.mark for own in self.counts.ends)

    def _next_header(self) -> str:
        """What the template writes between an answer and the next question, if answers end with white space."""
        turns = (Turn("user", "a", False), Turn("assistant", _MARKED, False), Turn("user", _NEXT, False))
        try:
            text = prompt_text(Conversation(turns=turns, where="the chat template"), self._tokenizer)
        except DataError:
            return ""
        return text.partition(_MARKED)[2].partition(_NEXT)[0].strip()

    def _notes(self, wording: Wording, records: int) -> Iterator[str]:
        counts, total = self.counts, f"of {records:,} records"
        if counts.unused:
            yield f"not used: {', '.join(counts.unused)}"
        for note, count in counts.notes.items():
            yield f"{note}: in {count:,} {total}"
        if len(counts.ways) > 1:
            ways = ", ".join(
                f"{count:,} {Wording(style=style, gap=gap, raw=raw)}"
                for (style, gap, raw), count in counts.ways.items()
            )
            yield f"records are worded in several ways ({ways}); prompts will be in the first: {wording}"
        yield from self._end_notes(wording)
        for role, count in counts.left_out.items():
            yield f"the chat template leaves out turns of the {role}'s: in {count:,} {total}"
        if counts.thoughts:
            yield (
                f"the chat template leaves out the reasoning of {counted(counts.thoughts, 'answer')}, which is learned "
                "as the records have it"
            )
        if counts.toolless:
            yield (
                f"the chat template does not write which tools there are: in {counts.toolless:,} {total}, whose calls "
                "are learned without; --set data.template=chatml writes them"
            )
        if counts.doubled:
            yield f"{counted(counts.doubled, 'answer')} held the end of the turn already: it is written once"
        if counts.apart:
            yield (
                f"{counts.apart:,} {total} give a sample for each answer: earlier answers become other text or tokens "
                "once later ones follow"
            )
        for lead, count in counts.leads.items():
            if lead:
                yield f"{lead!r} stands before {counted(count, 'answer')}: it is given, not learned"

    def _end_notes(self, wording: Wording) -> Iterator[str]:
        own = self._tokenizer.eos_token
        others = [self._tokenizer.convert_ids_to_tokens(end) for end in wording.ends]
        if own not in others:
            yield f"answers end with {', '.join(others) or repr(wording.end_text)}, the tokenizer's eos is {own}"
        if self._is_unmarked():
            yield f"the chat template writes nothing behind an answer: {own} is learned there"
        if wording.end_text:
            yield (
                f"answers also end where {wording.end_text!r} follows, which is not a single token: generation stops "
                "there, other programs need it as a stop string"
            )


def count_up(counts: dict[Key, int], keys: Iterable[Key]) -> None:
    """Count each of the keys once more."""
    for key in keys:
        counts[key] = counts.get(key, 0) + 1


def _by_number(counts: dict[Key, int]) -> list[Key]:
    """The keys, those counted most often first."""
    return sorted(counts, key=lambda key: -counts[key])


def usual_wording(tokenizer: Any) -> Wording:
    """How to prompt a model that is not from a qdist run: by its chat template, or with headings if it has none."""
    return Wording(style="chat" if tokenizer.chat_template else "headings")


def encode_prompt(conversation: Conversation, tokenizer: Any, wording: Wording) -> list[int]:
    """The tokens of a conversation that awaits a reply, worded as in training.

    Raises DataError if the chat template refuses it.
    """
    if wording.style == "chat" and not conversation.verbatim:
        require_template(tokenizer)
        text = prompt_text(conversation, tokenizer) + wording.lead
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    return prompt_of_segments(worded(conversation, wording), tokenizer)


def worded(conversation: Conversation, wording: Wording) -> Conversation:
    """A conversation in the style of a wording; raw text is unchanged."""
    style: Style = "headings" if wording.style == "chat" else wording.style
    return replace(conversation, style=style, gap=wording.gap)


def give_template(tokenizer: Any, template: NamedTemplate) -> tuple[str, ...]:
    """Give a tokenizer a chat template that the user names, in place of its own; returns notes about it.

    Raises ModelError where nothing could end a turn.
    """
    had, end = tokenizer.chat_template, template.end
    ends = bool(end) and _is_token(tokenizer, end)
    if tokenizer.eos_token is None and not ends and not template.complete:
        raise ModelError(
            f"the tokenizer has no end-of-text token, by which {template.name} would end an answer",
            try_="an eos_token in its tokenizer_config.json",
        )
    tokenizer.chat_template = jinja_of(template, opening=bool(opening(tokenizer)), end_is_token=ends)
    instead = " in place of the tokenizer's own" if had else ""
    notes = [f"chat template {template.name}{instead}: it is saved with the adapter"]
    if texts := [mark for mark in template.marks if not _is_token(tokenizer, mark)]:
        notes.append(f"{', '.join(texts)}: not tokens of this vocabulary, so they are written as text")
    if end and not ends:
        notes.append(f"turns end with {tokenizer.eos_token}: {end} is not a token of this vocabulary")
    return tuple(notes)


def require_worded(wording: Wording | None, template: NamedTemplate) -> None:
    """Raise DataError if the records are text as it stands, which no template words."""
    if wording is not None and wording.style != "chat":
        raise DataError(
            f"data.template={template.name} words conversations, and these records are {wording}",
            try_="leave data.template out",
        )


def _is_token(tokenizer: Any, mark: str) -> bool:
    """Whether a marker becomes one token."""
    return len(tokenizer(mark, add_special_tokens=False)["input_ids"]) == 1 and mark in tokenizer.get_vocab()


def keep_wording(tokenizer: Any, wording: Wording) -> str:
    """Give a tokenizer the chat template used in training if that was not its own; returns a note about it."""
    if wording.style == "chat":
        return ""
    own = template_of(wording.style, wording.gap, opening=bool(opening(tokenizer)))
    had = tokenizer.chat_template
    tokenizer.chat_template = {**had, "default": own} if isinstance(had, dict) else own
    return f"the chat template saved with the adapter writes {wording}, as the records do" if had else ""
