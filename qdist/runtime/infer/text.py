"""Turns the tokens of one answer into text as they come, up to what ends the answer."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from qdist.runtime.infer.decoding import as_written

_HELD_TOKENS = 64
"""Tokens that wait for the rest of a character, at most: a character has 4 bytes, but a token may hold the end of one
and the beginning of the next."""
_HALF = "\N{REPLACEMENT CHARACTER}"


class Script(NamedTuple):
    """How the answers of one adapter are written, and what ends them."""

    tokenizer: Any
    ends: Collection[int] = ()
    """Tokens that end an answer; they are no part of its text. Other special tokens are written out."""
    end_text: str = ""
    """Text before which an answer ends as well; empty for none."""


class AnswerText:
    """The text of an answer. Time is linear in its tokens."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        """stops: texts before the first of which the answer ends; empty ones are left out."""
        self._decoder, self._stops, self._held = _Decoder(tokenizer), tuple(filter(None, stops)), ""
        self.stopped = False
        """Whether a stop text was found."""

    def add(self, token: int) -> str:
        """Take a token; returns text that is certain now. Nothing after a stop text."""
        return "" if self.stopped else self._certain(self._decoder.add(token))

    def finish(self) -> str:
        """Text that was held back, now that no more tokens come."""
        if self.stopped:
            return ""
        text = self._certain(self._decoder.finish()) + self._held
        self._held = ""
        return text

    def _certain(self, new: str) -> str:
        if not self._stops:
            return new
        text = self._held + new
        found = min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        pending = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - pending :]
        return text[: len(text) - pending]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that may begin a stop text which does not end in it."""
    longest = min(len(stop) - 1, len(text))
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)


class _Decoder:
    """Text token by token: each is decoded after the last whole piece, since tokenizers treat a text's start apart."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before, self._new = list[int](), list[int]()
        """Tokens whose text was whole and has been told, and those after them."""
        self._told = 0
        """Characters of both that have been told."""

    def add(self, token: int) -> str:
        """Text that this token makes whole."""
        self._new.append(token)
        text = as_written(self._tokenizer, [*self._before, *self._new])
        whole = text.rstrip(_HALF) if len(self._new) < _HELD_TOKENS else text
        certain = whole[self._told :]
        self._told = max(self._told, len(whole))
        if len(whole) == len(text):
            self._before, self._new = self._new, []
            self._told = len(as_written(self._tokenizer, self._before))
        return certain

    def finish(self) -> str:
        """Half a character, as it is."""
        return as_written(self._tokenizer, [*self._before, *self._new])[self._told :]
