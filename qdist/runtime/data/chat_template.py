"""Renders conversations with a chat template, within time and memory limits, and compares with the record."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from msgspec.structs import replace

from qdist.core.data.conversation import THOUGHT, THOUGHT_END, Conversation, Role, Turn
from qdist.core.errors import DataError, ModelError
from qdist.core.text import format_bytes
from qdist.host.opening import told
from qdist.runtime.data import limits
from qdist.runtime.data.messages import (
    missing_of_call,
    readable_messages,
    readable_turns,
    template_of,
    tools_of,
    with_thoughts_in_text,
)
from qdist.runtime.data.template_mask import Marked, require_same_mask

T = TypeVar("T")
_TOGETHER = "records, or a chat_template, that go together"
_MOST_CHARACTERS = 1 << 26
_STAND_IN = "qdist-stands-in"
"""Placeholder answer that reveals what a template puts around an answer."""
_WITH_TOOLS = "--set data.template=chatml, which writes tools, calls and results; or records without them"


class LearnedAnswer(NamedTuple):
    """A learned turn within a rendering; `start` and `end` are positions in its text."""

    start: int
    """Position of the first character that a model would write: after the header and `lead`."""
    end: int
    """Position after the marker that ends the turn."""
    lead: str
    """What the template writes between the header and the text; empty if only white space."""
    mark: str
    """The marker that ends the turn; empty if there is none or only white space."""


class Rendering(NamedTuple):
    """A conversation, or its turns up to one of its answers, as rendered by the template."""

    text: str
    answers: tuple[LearnedAnswer, ...]


class Rendered(NamedTuple):
    """One rendering, or several if the template renders earlier answers differently once later ones follow."""

    parts: tuple[Rendering, ...]
    left_out: frozenset[Role]
    """Roles, other than learned ones, whose turns the template omits."""
    thoughts: int = 0
    """Number of answers whose reasoning the template omits; they are written as in the record."""
    doubled: int = 0
    """Number of answers that already ended with the end-of-turn marker, which is written once."""
    toolless: bool = False
    """Whether the template omits the definitions of the tools that the conversation has."""


def require_template(tokenizer: Any) -> None:
    """Raise ModelError for a tokenizer with chat templates but no default one."""
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise ModelError(
            f"the tokenizer has chat templates called {', '.join(sorted(named))}, and none called default",
            try_="rename one of them to default in its tokenizer_config.json",
        )


def render(conversation: Conversation, tokenizer: Any) -> Rendered:
    """The conversation through the chat template, with the position of each learned turn.

    An answer begins behind the rendering of the turns before it with the header that asks for a reply, which is what
    a model will be given, and ends where the template ends the turn. Its text must stand there, once, and so must the
    calls of tools and the reasoning that it has.

    Raises DataError when the template refuses the conversation, changes an answer or leaves out a part of it or the
    result of a call, and when its own mark of what is learned is another.
    """
    writer = _Writer(conversation, tokenizer)
    turns = writer.turns
    learned = [index for index, turn in enumerate(turns) if turn.learn]
    own = [writer.answered(index) for index in learned]
    bare = {index: _bare(turns[index].text, answer.mark) for index, (_, answer) in zip(learned, own, strict=True)}
    again = {index: text for index, text in bare.items() if text != turns[index].text}
    if again:
        once = (_without_end(turn, again[index]) if index in again else turn for index, turn in enumerate(turns))
        return render(replace(conversation, turns=tuple(once)), tokenizer)._replace(doubled=len(again))
    whole = own[-1][0] if turns[-1].learn else writer.through(len(turns) - 1)
    shared = [_within(whole, text, answer) for text, answer in own]
    if None not in shared:
        parts: tuple[Rendering, ...] = (Rendering(whole, tuple(answer for answer in shared if answer)),)
    else:
        parts = tuple(Rendering(text, (answer,)) for text, answer in own)
    writer.require_context(whole)
    context = [turn for turn in turns[: learned[-1] if learned else None] if not turn.learn and turn.role != "tool"]
    left_out = frozenset(turn.role for turn in context if turn.said.strip() not in parts[-1].text)
    return Rendered(parts, left_out, thoughts=writer.thoughts, toolless=writer.leaves_out_tools(whole))


def _without_end(turn: Turn, text: str) -> Turn:
    """A learned turn with the text that is left of it; not learned if it then says nothing."""
    left = replace(turn, text=text)
    return replace(left, learn=not left.is_empty)


def prompt_text(conversation: Conversation, tokenizer: Any) -> str:
    """The conversation including the header that asks for a reply. Raises DataError if the template refuses."""
    return _Writer(conversation, tokenizer).before(len(conversation.turns))


class _Writer:
    """Renders parts of a conversation through its template."""

    def __init__(self, conversation: Conversation, tokenizer: Any) -> None:
        self._conversation, self._tokenizer = conversation, tokenizer
        self._template = template_of(tokenizer, conversation)
        self.turns = readable_turns(conversation, self._template)
        self._tools = tools_of(conversation)
        self._messages = readable_messages(self.turns, self._template, partial(self._written, reply=False))
        self._begins_in_ways = bool(self._tools) or any(turn.calls or turn.thoughts for turn in self.turns)
        self.thoughts = 0
        self._through = dict[int, Marked]()

    def before(self, count: int) -> str:
        """The first `count` turns and the header that asks for a reply."""
        return self._written(self._messages[:count], reply=True)

    def through(self, index: int) -> str:
        """The turns up to and including `index`."""
        if index not in self._through:
            messages = self._messages[: index + 1]
            if self._template.marks_answers:
                self._through[index] = self._limited(partial(self._marked, messages))
            else:
                self._through[index] = Marked(self._written(messages, reply=False), ())
        return self._through[index].text

    def answered(self, index: int) -> tuple[str, LearnedAnswer]:
        """The turns up to and including a learned one, with its position."""
        before, through = self.before(index), self.through(index)
        turn = self.turns[index]
        find = self._composed if turn.calls or turn.thoughts else self._spoken
        text, answer = find(index, before, through)
        if text == through and self._template.marks_answers:
            self._require_same_mask(index, answer)
        return text, answer

    def _spoken(self, index: int, before: str, through: str) -> tuple[str, LearnedAnswer]:
        """An answer that is text alone."""
        said = self.turns[index].text.strip()
        ahead, found, tail = through.removeprefix(before).partition(said)
        if through.startswith(before) and found and said not in tail and not ahead.strip():
            return through, _answer(through, before, "", tail)
        written, tail = self._around(index)
        own = through[len(written) : len(through) - len(tail)]
        kept = through == written + own + tail and own.strip() == said
        if kept and written.startswith(before):
            return through, _answer(through, before, self._given(written.removeprefix(before)), tail)
        if kept and self._is_asked_alike(index, before, written):
            # Such as Mistral's, which writes the system's message before the last question alone.
            text = before + _white_end(written).removeprefix(_white_end(before)) + own + tail
            return text, _answer(text, before, "", tail)
        opened = before.rstrip().endswith(THOUGHT)
        spoken = said.rpartition(THOUGHT_END)[2].strip()
        if THOUGHT_END in said and spoken in through and (opened or written.startswith(before)):
            # Templates drop or rewrite what was thought.
            text = before + (said.removeprefix(THOUGHT).lstrip() if opened else said) + tail
            self.thoughts += text != through
            return text, _answer(text, before, "", tail)
        raise self._changed(index, before, through, said)

    def _composed(self, index: int, before: str, through: str) -> tuple[str, LearnedAnswer]:
        """An answer with calls of tools, or with reasoning that the template writes itself."""
        turn, (written, tail) = self.turns[index], self._around(index)
        if turn.thoughts and not turn.calls and turn.thoughts.strip() not in through[len(_common(before, through)) :]:
            # A template that knows reasoning and drops it here, as it would if that were within the text.
            own = with_thoughts_in_text(turn)
            self.turns = (*self.turns[:index], own, *self.turns[index + 1 :])
            return self._spoken(index, before, through)
        if not through.startswith(before):
            if not (through.startswith(written) and self._is_asked_alike(index, before, written)):
                raise self._changed(index, before, through, "")
            through = before + _white_end(written).removeprefix(_white_end(before)) + through[len(written) :]
            written = before
        lead = self._given(written.removeprefix(before)) if written.startswith(before) else ""
        lead = next((own for own in (lead, lead.rstrip()) if through.startswith(before + own)), "")
        if through.endswith(tail):
            answer = _answer(through, before, lead, tail)
        else:
            answer = _answer(through, before, lead, self._closing(through))
        self._require_whole(index, through[answer.start : answer.end])
        return through, answer

    def _given(self, lead: str) -> str:
        """What stands before an answer and is not learned.

        Where answers begin in several ways, with a call or a thought as well, a model has to choose between them, and
        only a thought that is closed at once is no choice of its own.
        """
        return lead if THOUGHT_END in lead or not self._begins_in_ways else ""

    def _closing(self, through: str) -> str:
        """The special token at the very end, and white space behind it; empty if there is none."""
        bare = through.rstrip()
        known = (str(token) for token in self._tokenizer.get_added_vocab())
        mark = max((token for token in known if bare.endswith(token)), key=len, default="")
        return mark + through[len(bare) :] if mark else ""

    def _require_whole(self, index: int, learned: str) -> None:
        """Raise DataError unless all of an answer is in its learned text: reasoning, text, and calls beside them."""
        turn, where = self.turns[index], self._conversation.where
        rest = learned
        for said, what in ((turn.thoughts.strip(), "reasoning"), (turn.text.strip(), "text")):
            if said not in rest:
                raise DataError(
                    f"{where}: the tokenizer's chat template does not write the {what} of turn {index + 1}, "
                    f"{said[:20]!r}..., beside its calls",
                    try_=f"records without it, or {_WITH_TOOLS}",
                )
            rest = rest.replace(said, "", 1) if said else rest
        self._require_calls(index, rest)

    def _require_calls(self, index: int, text: str) -> None:
        for call in self.turns[index].calls:
            if missing := missing_of_call(call, text):
                name = call["function"]["name"]
                what = "the call" if missing == name else f"{missing[:40]!r} in the call"
                raise DataError(
                    f"{self._conversation.where}: the tokenizer's chat template does not write {what} of turn "
                    f"{index + 1}, {name!r}",
                    try_=_WITH_TOOLS,
                )

    def require_context(self, whole: str) -> None:
        """Raise DataError if the template leaves out a call that is not learned, or what a tool returned."""
        for index, turn in enumerate(self.turns):
            if not turn.learn:
                self._require_calls(index, whole)
        results = [index for index, turn in enumerate(self.turns) if turn.role == "tool"]
        if not results:
            return
        marks = {index: f"{_STAND_IN}-{index}-" for index in results}
        messages = [
            {**own, "content": marks[index]} if index in marks else own for index, own in enumerate(self._messages)
        ]
        text = self._written(messages, reply=False)
        if lost := next((index for index, mark in marks.items() if mark not in text), None):
            raise DataError(
                f"{self._conversation.where}: the tokenizer's chat template does not write the result of a tool, turn "
                f"{lost + 1}",
                try_=_WITH_TOOLS,
            )

    def leaves_out_tools(self, whole: str) -> bool:
        """Whether the template writes nothing of which tools there are."""
        if self._tools is None:
            return False
        names = [str(tool.get("function", tool).get("name", "")) for tool in self._tools]
        if not all(name in whole for name in names):
            return True
        return self.through(len(self.turns) - 1) == self._written(self._messages, reply=False, toolless=True)

    def _require_same_mask(self, index: int, answer: LearnedAnswer) -> None:
        """Raise DataError where the template's own mark of what is learned differs."""
        through, found = self.through(index), self._through[index]
        earlier = next((at for at in range(index - 1, -1, -1) if self.turns[at].role == "assistant"), None)
        ended = "" if earlier is None else self.through(earlier).rstrip()
        known = len(ended) if through.startswith(ended) else None
        header = answer.start
        if index and found.marks_before(header, since=known or 0):
            header = len(_common(self.through(index - 1), through))
        since = header if known is None else known
        where = self._conversation.where
        require_same_mask(found, (answer.start, answer.end), since=since, header=header, where=where, turn=index + 1)

    def _marked(self, messages: Sequence[dict[str, Any]]) -> Marked:
        """Turns as the template writes them, and the ranges that it marks as a model's."""
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotation knows of one result
        rendered, spans = render(
            [messages],
            tools=self._tools,
            chat_template=self._template.source,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return Marked(self._bounded(rendered[0]), tuple(map(tuple, spans[0])))

    def _around(self, index: int) -> tuple[str, str]:
        """What the template writes before and after an answer, as far as it does not depend on the answer."""
        stand_in = {"role": self._messages[index]["role"], "content": _STAND_IN}
        text = self._written([*self._messages[:index], stand_in], reply=False)
        if text.count(_STAND_IN) > 1:
            raise DataError(
                f"{self._conversation.where}: the tokenizer's chat template writes turn {index + 1} twice",
                try_="a chat_template that writes each turn once",
            )
        written, _, tail = text.partition(_STAND_IN)
        return written, tail

    def _is_asked_alike(self, index: int, before: str, written: str) -> bool:
        """Whether the question and the header after it are unchanged even though earlier text differs."""
        question = self.turns[index - 1].said.strip()
        shared = _common(before.rstrip()[::-1], written.rstrip()[::-1])[::-1]
        return bool(question) and question in shared

    def _changed(self, index: int, before: str, through: str, said: str) -> DataError:
        where, turn = self._conversation.where, f"turn {index + 1}"
        header = _common(before, through)
        region = through[len(header) :]
        if said in region:
            asked = before[len(header) :] or header
            return DataError(
                f"{where}: the tokenizer's chat template asks for {turn} by {asked[-40:]!r} and does not write that "
                "before the answer itself, so a model would be asked in another way than it was trained",
                try_="a chat_template that writes the same header with add_generation_prompt",
            )
        missing = _missing(said, region)
        return DataError(
            f"{where}: the tokenizer's chat template leaves out {len(missing):,} characters of {turn}, "
            f"{missing[:20]!r}...",
            try_="a chat_template that writes answers as they are",
        )

    def _written(self, messages: Sequence[dict[str, Any]], *, reply: bool, toolless: bool = False) -> str:
        tools, apply = None if toolless else self._tools, self._tokenizer.apply_chat_template
        call = partial(apply, list(messages), tools=tools, tokenize=False, add_generation_prompt=reply)
        return self._bounded(self._limited(call))

    def _bounded(self, rendered: str) -> str:
        if len(rendered) > _MOST_CHARACTERS:
            raise _endless(f"wrote {len(rendered):,} characters", self._conversation.where)
        return rendered

    def _limited(self, call: Callable[[], T]) -> T:
        """What the template gives. Raises DataError if it refuses, ModelError if it never ends."""
        where = self._conversation.where
        try:
            with told(f"{where}: the tokenizer's chat template refuses it", DataError, try_=_TOGETHER):
                return limits.limited(call)
        except limits.TooLong:
            raise _endless(f"took longer than {limits.MOST_S:g} s", where) from None
        except DataError as error:
            if isinstance(error.__cause__, MemoryError):
                raise _endless(f"took more than {format_bytes(limits.MOST_BYTES)} of memory", where) from None
            raise


def _endless(what: str, where: str) -> ModelError:
    """The error for a template that never ends, which would repeat with every record."""
    return ModelError(f"the tokenizer's chat template {what} on {where}", try_="another chat_template")


def _within(whole: str, text: str, answer: LearnedAnswer) -> LearnedAnswer | None:
    """An answer's position in the whole conversation; None if it is written differently there.

    What a template writes at the very end ('<|end|>\\n<|endoftext|>') stands behind the last answer alone.
    """
    first = next(iter(answer.mark.split()), "")
    for own in (answer, answer._replace(end=answer.end - len(answer.mark) + len(first), mark=first)):
        if whole[: own.end] == text[: own.end]:
            return own
    return None


def _answer(text: str, before: str, lead: str, tail: str) -> LearnedAnswer:
    """The position of an answer in a rendering.

    White space behind the mark ('<|im_end|>\\n') opens the next turn and isn't learned; where nothing but white
    space follows the text, that is the end of the turn.
    """
    start, mark = len(before) + (len(lead) if lead.strip() else 0), tail.strip()
    if mark and before.rstrip().endswith(mark):
        mark = mark.split()[0]  # the template asks for one more answer, whether it is told to or not
    end = len(text) - len(tail) + tail.index(mark) + len(mark) if mark else len(text)
    return LearnedAnswer(start, end, lead if lead.strip() else "", mark)


def _bare(text: str, mark: str) -> str:
    """An answer without the end-of-turn marker, or its beginning, that the answer itself contains."""
    said = text.rstrip()
    doubled = next((end for end in (mark, *mark.split()[:1]) if end and said.endswith(end)), "")
    return said.removesuffix(doubled) if doubled else text


def _missing(said: str, region: str) -> str:
    """The part of an answer that is missing: all after its longest prefix found, or before its longest suffix."""
    lengths = range(1, len(said) + 1)
    first = bisect_left(lengths, True, key=lambda length: said[:length] not in region)
    last = bisect_left(lengths, True, key=lambda length: said[len(said) - length :] not in region)
    return said[first:] if first >= last else said[: len(said) - last]


def _common(one: str, other: str) -> str:
    """Common prefix of two texts."""
    shorter = min(one, other, key=len)
    return shorter[: next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)]


def _white_end(text: str) -> str:
    return text[len(text.rstrip()) :]
