"""What do answers look like in OpenAI's API, whole and in the chunks of a stream?"""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from qdist.runtime.infer.answerer import Ended, Piece
from qdist.runtime.infer.decoding import as_written

_LEAST_LOGPROB = -9999.0
"""OpenAI's value for a token that cannot come; JSON has no infinity."""


class Choice:
    """One answer as it grows."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.texts: list[str] = []
        self.ended: Ended | None = None

    def add(self, what: Piece | Ended) -> None:
        """Take what was heard of it."""
        self.texts.append(what.text)
        if isinstance(what, Piece):
            self.pieces.append(what)
        else:
            self.ended = what

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)


class Usage(NamedTuple):
    """Tokens that a request has taken."""

    prompt_tokens: int
    completion_tokens: int

    def content(self) -> dict[str, int]:
        """As the API tells it."""
        return self._asdict() | {"total_tokens": self.prompt_tokens + self.completion_tokens}


class Shape(Protocol):
    """How an endpoint writes answers."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """All answers at once."""

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        """Chunks before the first piece of an answer."""

    def piece(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """Chunks for a token."""

    def last(self, index: int, ended: Ended) -> Iterator[dict[str, Any]]:
        """Chunks for the end of an answer."""

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk that tells the numbers of tokens."""


class _Written:
    """What all answers of a request have in common. includes_usage: whether chunks have the field."""

    def __init__(self, prefix: str, kind: str, model: str, *, includes_usage: bool) -> None:
        self._id, self._created = f"{prefix}-{secrets.token_hex(12)}", int(time.time())
        self._kind, self._model, self._includes_usage = kind, model, includes_usage

    def of(self, choices: Sequence[Mapping[str, Any]], kind: str = "") -> dict[str, Any]:
        """An object with its choices."""
        return {
            "id": self._id,
            "object": kind or self._kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def chunk(self, kind: str, *choices: Mapping[str, Any]) -> dict[str, Any]:
        """A chunk of a stream."""
        return self.of(choices, kind) | ({"usage": None} if self._includes_usage else {})


class ChatShape:
    """Answers of `/v1/chat/completions`. logprobs: whether they are told."""

    def __init__(self, model: str, tokenizer: Any, *, logprobs: bool, includes_usage: bool) -> None:
        self._head = _Written("chatcmpl", "chat.completion", model, includes_usage=includes_usage)
        self._tokenizer, self._logprobs = tokenizer, logprobs

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        written = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._told(choice.pieces),
                "finish_reason": _finish(choice.ended),
            }
            for index, choice in enumerate(choices)
        ]
        return self._head.of(written) | {"usage": usage.content()}

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        yield self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.text or self._logprobs:
            yield self._chunk(index, {"content": piece.text}, logprobs=self._told([piece]))

    def last(self, index: int, ended: Ended) -> Iterator[dict[str, Any]]:
        if ended.text:
            yield self._chunk(index, {"content": ended.text})
        yield self._chunk(index, {}, finish=_finish(ended))

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._head.chunk("chat.completion.chunk") | {"usage": usage.content()}

    def _chunk(
        self, index: int, delta: Mapping[str, str], *, logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._head.chunk("chat.completion.chunk", choice)

    def _told(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            _token(as_written(self._tokenizer, [piece.token]), piece.logprob)
            | {"top_logprobs": [_token(each.text, each.logprob) for each in piece.likely]}
            for piece in pieces
        ]
        return {"content": content, "refusal": None}


class CompletionShape:
    """Answers of `/v1/completions`. echoed: text of each choice's prompt, if it is to be told before the answer."""

    def __init__(
        self, model: str, tokenizer: Any, *, logprobs: bool, includes_usage: bool, echoed: Sequence[str] = ()
    ) -> None:
        self._head = _Written("cmpl", "text_completion", model, includes_usage=includes_usage)
        self._tokenizer, self._logprobs, self._echoed = tokenizer, logprobs, echoed
        self._offsets: dict[int, int] = {}
        """Characters that the told tokens of a choice have, by its index."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        written = [
            self._choice(
                index, self._echo(index) + choice.text, self._told(index, choice.pieces), _finish(choice.ended)
            )
            for index, choice in enumerate(choices)
        ]
        return self._head.of(written) | {"usage": usage.content()}

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        if self._echoed:
            yield self._chunk(index, self._echo(index))

    def piece(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.text or self._logprobs:
            yield self._chunk(index, piece.text, logprobs=self._told(index, [piece]))

    def last(self, index: int, ended: Ended) -> Iterator[dict[str, Any]]:
        yield self._chunk(index, ended.text, finish=_finish(ended))

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._head.chunk("text_completion") | {"usage": usage.content()}

    def _echo(self, index: int) -> str:
        return self._echoed[index] if self._echoed else ""

    def _chunk(self, index: int, text: str, *, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        return self._head.chunk("text_completion", self._choice(index, text, logprobs, finish))

    @staticmethod
    def _choice(index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _told(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        tokens = [as_written(self._tokenizer, [piece.token]) for piece in pieces]
        offsets, at = list[int](), self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self._offsets[index] = at
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(piece.logprob) for piece in pieces],
            "top_logprobs": [{each.text: _finite(each.logprob) for each in piece.likely} for piece in pieces],
            "text_offset": offsets,
        }


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None else max(logprob, _LEAST_LOGPROB)


def _finish(ended: Ended | None) -> str | None:
    """OpenAI's word for why an answer ended; one that was cancelled was cut, as one that is too long."""
    if ended is None:
        return None
    return "stop" if ended.reason == "stop" else "length"
