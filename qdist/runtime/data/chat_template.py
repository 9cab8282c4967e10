"""Renders conversations with a chat template, within time and memory limits, and compares with the record."""

import resource
import signal
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from msgspec.structs import replace

from qdist.core.data.conversation import Conversation, Role
from qdist.core.errors import DataError, ModelError
from qdist.core.text import format_bytes
from qdist.host.opening import told

T = TypeVar("T")

MOST_S = 10.0
MOST_BYTES = 1 << 30
_KILLED_S = 30.0


class TooLong(BaseException):
    """A call took longer than `MOST_S`. Not an Exception, so that the interrupted code does not catch it."""


def limited(call: Callable[[], T]) -> T:
    """The result of a call. Raises TooLong, MemoryError, and whatever the call raises.

    Signals are the main thread's alone: in others there is the limit of memory, and that on Linux.
    """
    if threading.current_thread() is not threading.main_thread():
        return _small(call)
    _listen()
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_S)
    signal.setitimer(signal.ITIMER_PROF, _KILLED_S)
    try:
        return _small(call)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


@cache
def _listen() -> None:
    """Install the handler, once: that takes as long as rendering a short conversation."""
    signal.signal(signal.SIGVTALRM, _ring)


def _ring(*_: object) -> None:
    raise TooLong


def _small(call: Callable[[], T]) -> T:
    if sys.platform != "linux":
        return call()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = _address_space(int(time.monotonic())) + MOST_BYTES
    if limits[0] == resource.RLIM_INFINITY or most < limits[0]:
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@lru_cache(maxsize=1)
def _address_space(_second: int) -> int:
    """Bytes mapped by this process, looked up at most once a second."""
    return int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()


_THOUGHT, _THOUGHT_END = "<think>", "</think>"
_TOGETHER = "records, or a chat_template, that go together"
_MOST_CHARACTERS = 1 << 26
_STAND_IN = "qdist-stands-in"
"""Placeholder answer that reveals what a template puts around an answer."""


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
    a model will be given, and ends where the template ends the turn. Its text must stand there, once.

    Raises DataError when the template refuses the conversation, changes an answer or leaves out a part of it.
    """
    writer, turns = _Writer(conversation, tokenizer), conversation.turns
    learned = [index for index, turn in enumerate(turns) if turn.learn]
    own = [writer.answered(index) for index in learned]
    bare = {index: _bare(turns[index].text, answer.mark) for index, (_, answer) in zip(learned, own, strict=True)}
    again = {index: text for index, text in bare.items() if text != turns[index].text}
    if again:
        once = (
            replace(turn, text=again[index], learn=bool(again[index].strip())) if index in again else turn
            for index, turn in enumerate(turns)
        )
        return render(replace(conversation, turns=tuple(once)), tokenizer)._replace(doubled=len(again))
    whole = own[-1][0] if turns[-1].learn else writer.through(len(turns) - 1)
    shared = [_within(whole, text, answer) for text, answer in own]
    if None not in shared:
        parts: tuple[Rendering, ...] = (Rendering(whole, tuple(answer for answer in shared if answer)),)
    else:
        parts = tuple(Rendering(text, (answer,)) for text, answer in own)
    context = [turn for turn in turns[: learned[-1] if learned else None] if not turn.learn]
    left_out = frozenset(turn.role for turn in context if turn.said.strip() not in parts[-1].text)
    return Rendered(parts, left_out, thoughts=writer.thoughts)


def prompt_text(conversation: Conversation, tokenizer: Any) -> str:
    """The conversation including the header that asks for a reply. Raises DataError if the template refuses."""
    return _Writer(conversation, tokenizer).before(len(conversation.turns))


class _Writer:
    """Renders parts of a conversation through its template."""

    def __init__(self, conversation: Conversation, tokenizer: Any) -> None:
        self._conversation, self._tokenizer = conversation, tokenizer
        self._messages = [{"role": turn.role, "content": turn.said} for turn in conversation.turns]
        self.thoughts = 0

    def before(self, count: int) -> str:
        """The first `count` turns and the header that asks for a reply."""
        return self._written(self._messages[:count], reply=True)

    def through(self, index: int) -> str:
        """The turns up to and including `index`."""
        return self._written(self._messages[: index + 1], reply=False)

    def answered(self, index: int) -> tuple[str, LearnedAnswer]:
        """The turns up to and including a learned one, with its position."""
        said, before, through = self._conversation.turns[index].text.strip(), self.before(index), self.through(index)
        ahead, found, tail = through.removeprefix(before).partition(said)
        if through.startswith(before) and found and said not in tail and not ahead.strip():
            return through, _answer(through, before, "", tail)
        written, tail = self._around(index)
        own = through[len(written) : len(through) - len(tail)]
        kept = through == written + own + tail and own.strip() == said
        if kept and written.startswith(before):
            return through, _answer(through, before, written.removeprefix(before), tail)
        if kept and self._is_asked_alike(index, before, written):
            # Such as Mistral's, which writes the system's message before the last question alone.
            text = before + _white_end(written).removeprefix(_white_end(before)) + own + tail
            return text, _answer(text, before, "", tail)
        opened = before.rstrip().endswith(_THOUGHT)
        spoken = said.rpartition(_THOUGHT_END)[2].strip()
        if _THOUGHT_END in said and spoken in through and (opened or written.startswith(before)):
            # Templates drop or rewrite what was thought.
            text = before + (said.removeprefix(_THOUGHT).lstrip() if opened else said) + tail
            self.thoughts += text != through
            return text, _answer(text, before, "", tail)
        raise self._changed(index, before, through, said)

    def _around(self, index: int) -> tuple[str, str]:
        """What the template writes before and after an answer, as far as it does not depend on the answer."""
        stand_in = {**self._messages[index], "content": _STAND_IN}
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
        question = self._conversation.turns[index - 1].said.strip()
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

    def _written(self, messages: Sequence[dict[str, str]], *, reply: bool) -> str:
        where, apply = self._conversation.where, self._tokenizer.apply_chat_template
        call = partial(apply, list(messages), tokenize=False, add_generation_prompt=reply)
        try:
            with told(f"{where}: the tokenizer's chat template refuses it", DataError, try_=_TOGETHER):
                rendered: str = limited(call)
        except TooLong:
            raise _endless(f"took longer than {MOST_S:g} s", where) from None
        except DataError as error:
            if isinstance(error.__cause__, MemoryError):
                raise _endless(f"took more than {format_bytes(MOST_BYTES)} of memory", where) from None
            raise
        if len(rendered) > _MOST_CHARACTERS:
            raise _endless(f"wrote {len(rendered):,} characters", where)
        return rendered


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
