"""How are questions that are asked at the same time answered on a terminal: each token as it comes?"""

import queue
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from qdist.host.columns import Columns
from qdist.host.terminal import say
from qdist.runtime.infer.answerer import Ended, Listener, Piece, Question
from qdist.runtime.infer.runner import Runner

_LEAST_COLUMNS = 100
"""Cells of a terminal on which two answers have a column each."""
_LOOK_S = 0.2
"""Seconds between two looks whether the thread that answers has failed."""


class Hearing:
    """Questions asked at the same time, whose answers are shown as they come."""

    def __init__(self, runner: Runner, questions: Sequence[Question], shown: "Shown") -> None:
        self._runner, self._shown, self._questions = runner, shown, questions
        self._told: queue.SimpleQueue[tuple[int, Piece | Ended] | None] = queue.SimpleQueue()
        """What is heard, by the number of its question; None for Ctrl-C."""
        self._texts = [""] * len(questions)
        self._ended: dict[int, Ended] = {}
        self._began = self._first = self._last = time.monotonic()

    def answers(self) -> list[str]:
        """The answers, when they have ended; Ctrl-C ends them where they are.

        Raises the QdistError for which the thread that answers has ended, or an answer.
        """
        with _at_ctrl_c(lambda: self._told.put(None)):
            tickets = [
                self._runner.submit(question, self._listener(number)) for number, question in enumerate(self._questions)
            ]
            while len(self._ended) < len(tickets):
                heard = self._next()
                if heard is not None:
                    self._take(*heard)
                    continue
                for ticket in tickets:
                    self._runner.cancel(ticket)
        for ended in self._ended.values():
            if ended.error:
                raise ended.error
        return self._texts

    @property
    def held(self) -> int:
        """Tokens of the longest conversation, answer included."""
        return max(ended.prompt_tokens + ended.new_tokens for ended in self._ended.values())

    def summary(self, positions: int) -> str:
        """'34 tokens, 12.3 tokens/s, the first after 0.4 s; 210 of 4,096 tokens of the conversation'."""
        new = sum(ended.new_tokens for ended in self._ended.values())
        later, seconds = new - len(self._ended), self._last - self._first
        rate = f", {later / seconds:,.1f} tokens/s" if later > 0 and seconds > 0 else ""
        return (
            f"{new:,} tokens{rate}, the first after {self._first - self._began:.1f} s; "
            f"conversation {self.held:,} of {positions:,} tokens"
        )

    def _listener(self, number: int) -> Listener:
        return lambda told: self._told.put((number, told))

    def _next(self) -> tuple[int, Piece | Ended] | None:
        """What is heard next. Raises the error for which the thread that answers has ended."""
        while True:
            with suppress(queue.Empty):
                return self._told.get(timeout=_LOOK_S)
            if self._runner.failed:
                raise self._runner.failed

    def _take(self, number: int, told: Piece | Ended) -> None:
        """Show it."""
        self._last = time.monotonic()
        if self._first == self._began:
            self._first = self._last
        self._texts[number] += told.text
        if told.text:
            self._shown.add(number, told.text)
        if isinstance(told, Ended):
            self._ended[number] = told
            self._shown.end(number)


@contextmanager
def _at_ctrl_c(act: Callable[[], None]) -> Iterator[None]:
    """Have Ctrl-C do something, and raise nothing: an exception between two lines would lose what was heard there."""
    before = signal.signal(signal.SIGINT, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Shown:
    """One answer, printed as it comes."""

    def add(self, number: int, text: str) -> None:
        """Print more of it."""
        say(text, end="")

    def end(self, number: int) -> None:
        """End its line."""
        say()


class _Under(Shown):
    """Answers one under the other: the first as it comes, the others when those above are complete."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels, self._texts, self._now = labels, [""] * len(labels), 0
        self._ended = [False] * len(labels)
        say(f"{labels[0]}:", dim=True)

    def add(self, number: int, text: str) -> None:
        """Print more of the one that is printed now, keep more of the others."""
        if number == self._now:
            say(text, end="")
        else:
            self._texts[number] += text

    def end(self, number: int) -> None:
        """Go on with the next when the one that is printed now has ended."""
        self._ended[number] = True
        while self._now < len(self._labels) and self._ended[self._now]:
            say()
            self._now += 1
            if self._now < len(self._labels):
                say(f"{self._labels[self._now]}:", dim=True)
                say(self._texts[self._now], end="")


class _Beside(Shown):
    """Answers in columns."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._columns = Columns(labels)

    def add(self, number: int, text: str) -> None:
        """Lengthen a column."""
        self._columns.add(number, text)

    def end(self, number: int) -> None:
        """End a column."""
        self._columns.end(number)


def shown_as(labels: Sequence[str], *, live: bool) -> Shown:
    """How answers of these voices are shown."""
    if len(labels) == 1:
        return Shown()
    wide = live and shutil.get_terminal_size().columns >= _LEAST_COLUMNS
    return _Beside(labels) if wide else _Under(labels)
