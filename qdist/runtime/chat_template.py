"""What a chat template makes of a conversation, compared with what the record said."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from msgspec.structs import replace

from qdist.core.conversation import Conversation, Role
from qdist.core.errors import DataError, ModelError

_THOUGHT, _THOUGHT_END = "<think>", "</think>"
_TELLING = 4
"""Characters of an answer from which its second appearance is no accident."""


class Answer(NamedTuple):
    """A learned turn within a rendering; `start` and `end` are places in its text."""

    start: int
    """Of the first character that a model would write: behind the header, and behind `lead`."""
    end: int
    """Behind what ends the turn."""
    lead: str
    """What the template writes between the header and the text; empty where that is white space."""
    mark: str
    """What ends the turn; empty where that is white space, or nothing."""


class Rendering(NamedTuple):
    """A conversation, or what came before and with one of its answers, as the template writes it."""

    text: str
    answers: tuple[Answer, ...]


class Rendered(NamedTuple):
    """One rendering; several where the template writes earlier answers otherwise once later ones follow."""

    parts: tuple[Rendering, ...]
    left_out: frozenset[Role]
    """Whose turns, of those that are not learned, the template does not show."""
    thoughts: int = 0
    """Answers whose reasoning the template leaves out; they are written as the record has them."""
    doubled: int = 0
    """Answers that ended with the end of the turn already; it is written once."""


def require_template(tokenizer: Any) -> None:
    """Raise ModelError for a tokenizer with chat templates of which none is the default."""
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise ModelError(
            f"the tokenizer has chat templates called {', '.join(sorted(named))}, and none called default",
            try_="rename one of them to default in its tokenizer_config.json",
        )


def render(conversation: Conversation, tokenizer: Any) -> Rendered:
    """The conversation through the chat template, and where each learned turn stands.

    An answer begins behind the rendering of the turns before it with the header that asks for a reply, which is what
    a model will be given, and ends where the template ends the turn. Its text must stand there, once.

    Raises DataError when the template refuses the conversation, changes an answer or leaves out a part of it.
    """
    writer = _Writer(conversation, tokenizer)
    last = len(conversation.turns) - 1
    own = [writer.answered(index) for index, turn in enumerate(conversation.turns) if turn.learn]
    again = {
        index: turn.text.rstrip().removesuffix(answer.mark)
        for (index, turn), (_, answer) in zip(
            [pair for pair in enumerate(conversation.turns) if pair[1].learn], own, strict=True
        )
        if answer.mark and turn.text.rstrip().endswith(answer.mark)
    }
    if again:
        turns = tuple(replace(turn, text=again.get(index, turn.text)) for index, turn in enumerate(conversation.turns))
        return render(replace(conversation, turns=turns), tokenizer)._replace(doubled=len(again))
    whole = own[-1][0] if conversation.turns[last].learn else writer.through(last)
    shared = [_within(whole, text, answer) for text, answer in own]
    if None not in shared:
        parts: tuple[Rendering, ...] = (Rendering(whole, tuple(answer for answer in shared if answer)),)
    else:
        parts = tuple(Rendering(text, (answer,)) for text, answer in own)
    left_out = frozenset(
        turn.role for turn in conversation.turns if not turn.learn and turn.said.strip() not in parts[-1].text
    )
    return Rendered(parts, left_out, thoughts=writer.thoughts)


def prompt_text(conversation: Conversation, tokenizer: Any) -> str:
    """The conversation up to and with the header that asks for a reply. Raises DataError when the template refuses."""
    return _Writer(conversation, tokenizer).before(len(conversation.turns))


class _Writer:
    """A conversation and the template that writes it."""

    def __init__(self, conversation: Conversation, tokenizer: Any) -> None:
        self._conversation, self._tokenizer = conversation, tokenizer
        self._messages = [{"role": turn.role, "content": turn.said} for turn in conversation.turns]
        self.thoughts = 0

    def before(self, count: int) -> str:
        """The first turns, and the header that asks for a reply."""
        return self._written(self._messages[:count], reply=True)

    def through(self, index: int) -> str:
        """The turns up to one, and with it."""
        return self._written(self._messages[: index + 1], reply=False)

    def answered(self, index: int) -> tuple[str, Answer]:
        """The turns up to a learned one, and where it stands."""
        before, through, said = self.before(index), self.through(index), self._conversation.turns[index].text.strip()
        header = before if through.startswith(before) else _common(before, through)
        region = through[len(header) :]
        at = region.find(said)
        if at < 0 or header != before:
            return self._by_ourselves(index, before, header, region, said)
        lead, tail = _without(region[:at], self._conversation.turns[index].text), region[at + len(said) :]
        if len(said) >= _TELLING and (said in lead or said in tail):
            raise DataError(
                f"{self._conversation.where}: the tokenizer's chat template writes turn {index + 1} twice",
                try_="a chat_template that writes each turn once",
            )
        start = len(before) + (len(lead) if lead.strip() else 0)
        return through, _ended(through, start, len(header) + at + len(said), lead if lead.strip() else "", tail)

    def _by_ourselves(self, index: int, before: str, header: str, region: str, said: str) -> tuple[str, Answer]:
        """An answer that the template does not write as it is: with a thought, which templates drop, we write it."""
        spoken = said.rpartition(_THOUGHT_END)[2].strip() if _THOUGHT_END in said else ""
        at = region.find(spoken) if spoken else -1
        opened = before.rstrip().endswith(_THOUGHT)
        if at < 0 or not (header == before or opened):
            raise self._changed(index, before, header, region, said)
        self.thoughts += 1
        written = said.removeprefix(_THOUGHT).lstrip() if opened else said
        tail = region[at + len(spoken) :]
        text = before + written + tail
        return text, _ended(text, len(before), len(before) + len(written), "", tail)

    def _changed(self, index: int, before: str, header: str, region: str, said: str) -> DataError:
        where, turn = self._conversation.where, f"turn {index + 1}"
        if region.find(said) >= 0:
            asked = before[len(header) :] or header
            return DataError(
                f"{where}: the tokenizer's chat template asks for {turn} by {asked[-40:]!r} and does not write that "
                "before the answer itself, so a model would be asked in another way than it was trained",
                try_="a chat_template that writes the same header with add_generation_prompt",
            )
        blocks = SequenceMatcher(None, said, region, autojunk=False).get_matching_blocks()
        kept = max(blocks, key=lambda block: block.size)
        missing = said if kept.a or not kept.size else said[kept.size :]
        return DataError(
            f"{where}: the tokenizer's chat template leaves out {len(said) - kept.size} characters of {turn}, "
            f"{missing[:20]!r}...",
            try_="a chat_template that writes answers as they are",
        )

    def _written(self, messages: Sequence[dict[str, str]], *, reply: bool) -> str:
        from jinja2 import TemplateError

        try:
            rendered: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=reply
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise DataError(
                f"{self._conversation.where}: the tokenizer's chat template refuses it: {error}",
                try_="records, or a chat_template, that go together",
            ) from error
        return rendered


def _within(whole: str, text: str, answer: Answer) -> Answer | None:
    """An answer's place in the whole conversation; None where that does not write it in the same way.

    What a template writes at the very end ('<|end|>\\n<|endoftext|>') stands behind the last answer alone.
    """
    first = next(iter(answer.mark.split()), "")
    for own in (answer, answer._replace(end=answer.end - len(answer.mark) + len(first), mark=first)):
        if whole[: own.end] == text[: own.end]:
            return own
    return None


def _without(lead: str, text: str) -> str:
    """What stands before an answer, less the white space that the answer itself begins with."""
    return lead.removesuffix(text[: len(text) - len(text.lstrip())])


def _common(one: str, other: str) -> str:
    """What two texts begin with."""
    length = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return one[: min(len(one), len(other)) if length is None else length]


def _ended(text: str, start: int, said_end: int, lead: str, tail: str) -> Answer:
    """Where an answer ends.

    White space behind the mark ('<|im_end|>\\n') opens the next turn and isn't learned; where nothing but white
    space follows the text, that is the end of the turn.
    """
    mark = tail.strip()
    return Answer(start, said_end + len(tail.rstrip()) if mark else len(text), lead, mark)
