"""Chat with a model on a terminal; answers are streamed."""

import signal
from itertools import takewhile
from typing import Any

from qdist.core.data.conversation import Conversation, Turn
from qdist.core.errors import DataError, nearest
from qdist.core.requests import Chat
from qdist.host.terminal import say
from qdist.runtime.infer.decoding import answer_of, as_written, complete, text_of
from qdist.runtime.infer.load import ROOM_TOKENS, open_model
from qdist.runtime.infer.prompts import Speech, encode_prompts, speech_of
from qdist.runtime.quantize.materialize import trust

_COMMANDS = {"/new": "start over", "/help": "show this", "/quit": "leave"}
_HELP = "\n".join((
    *(f"{name:7}{what}" for name, what in _COMMANDS.items()),
    "Ctrl-C ends an answer and keeps what was said; at the prompt it leaves, as an empty line does",
))  # fmt: skip


def run(request: Chat) -> None:
    """Chat until the user leaves."""
    if request.trust_remote_code:
        trust(request.run)
    chat(
        request.run,
        system=request.system,
        max_new_tokens=request.max_new_tokens,
        max_memory_bytes=request.max_memory_bytes,
    )


def chat(target: str, *, max_new_tokens: int, system: str, max_memory_bytes: int | None = None) -> None:
    """Talk to a model. `/new` starts over; Ctrl-C ends an answer; `/quit`, an empty line or end of input leaves.

    Raises DataError, before weights are read, for a system message that the chat template refuses.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent leaves Ctrl-C to us, and we inherit that
    speech = speech_of(target)
    opening: tuple[Turn, ...] = (Turn("system", system, False),) if system else ()
    if opening:
        _encoded((*opening, Turn("user", "?", False)), speech, where="--system")
    opened = open_model(target, tokens=ROOM_TOKENS, max_memory_bytes=max_memory_bytes, needs_tokenizer=True)
    for line in filter(None, (opened.where, speech.note)):
        say(line, err=True)
    say("type a message; /help tells the commands, an empty line leaves")
    turns = opening
    while (text := _typed()) not in ("", "/quit"):
        if text == "/new":
            turns = opening
        elif text.startswith("/"):
            say(_about(text))
        else:
            turns = _exchange(opened.model, speech, (*turns, Turn("user", text, False)), max_new_tokens)


def _typed() -> str:
    """A line of input; empty if the user wants to leave."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        say()
        return ""


def _about(text: str) -> str:
    word = text.split()[0]
    if word in _COMMANDS:
        return _HELP
    close = nearest(word, _COMMANDS)
    return f"no command {word}; " + (f"{close}?" if close else f"there are {', '.join(_COMMANDS)}")


def _exchange(model: Any, speech: Speech, turns: tuple[Turn, ...], max_new_tokens: int) -> tuple[Turn, ...]:
    """The conversation with the answer added, or without the question if it cannot be answered."""
    try:
        prompt = _encoded(turns, speech, where="the conversation")
    except DataError as error:
        say(f"{error.message}; /new starts over")
        return turns[:-1]
    room = max_new_tokens if speech.positions is None else min(max_new_tokens, speech.positions - len(prompt))
    printer = _Printer(speech)
    try:
        complete(
            model, speech.tokenizer, [prompt], max_new_tokens=room, end_text=speech.wording.end_text, streamer=printer
        )
    except KeyboardInterrupt:
        printer.end()
    return (*turns, Turn("assistant", text_of(speech.tokenizer, printer.answer(model)), False))


def _encoded(turns: tuple[Turn, ...], speech: Speech, *, where: str) -> list[int]:
    return encode_prompts([Conversation(turns=turns, where=where)], speech)[0]


class _Printer:
    """Prints an answer token by token, except the text that ends it; transformers calls `put` and `end`."""

    def __init__(self, speech: Speech) -> None:
        self._tokenizer, self._end_text, self._ends = speech.tokenizer, speech.wording.end_text, speech.wording.ends
        self._tokens: list[int] = []
        self._prompted = False
        self._printed = ""

    def put(self, value: Any) -> None:
        """Take the prompt first, then each token."""
        if not self._prompted:
            self._prompted = True
            return
        self._tokens += value.flatten().tolist()
        text = self._text()
        # Half a character is one that cannot be printed yet, and so may be half of the end text.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._print(text[: len(text) - self._pending(text)])

    def end(self) -> None:
        """Print what was held back, and end the line."""
        self._print(self._text())
        say()

    def answer(self, model: Any) -> list[int]:
        """The generated tokens, up to the end of the answer."""
        return answer_of(model, self._tokenizer, self._tokens, self._end_text)

    def _text(self) -> str:
        # What ends an answer may be a token as any other.
        said = list(takewhile(lambda token: token not in self._ends, self._tokens))
        text = as_written(self._tokenizer, said, skip_special_tokens=True)
        return text.partition(self._end_text)[0] if self._end_text else text

    def _pending(self, text: str) -> int:
        """Number of characters at the end that may begin the end text."""
        longest = min(len(self._end_text) - 1, len(text))
        return next((count for count in range(longest, 0, -1) if text.endswith(self._end_text[:count])), 0)

    def _print(self, text: str) -> None:
        if len(text) > len(self._printed):
            say(text[len(self._printed) :], end="")
            self._printed = text
