"""Runs an answerer on a thread of its own, for callers on any thread."""

from collections.abc import Callable
from itertools import count
from threading import Condition, Thread
from types import TracebackType

from qdist.core.errors import DataError, JobError, QdistError
from qdist.runtime.infer.answerer import Answerer, Ended, Listener, Piece, Question
from qdist.runtime.infer.line import require_answerable


def _ignore(_: QdistError) -> None:
    """The default of `when_failed`."""


class Runner:
    """Steps an answerer while it has work, and waits without computing while it has none. A context manager.

    `submit` and `cancel` may be called from any thread and return at once. Listeners are called on the runner's thread.

    when_failed: is told, on the runner's thread, of an error that ended the work. Answers that had not ended hear no
    more (`Ended` does not come), `failed` is the error, and `submit` and `drain` raise it.
    """

    def __init__(self, answerer: Answerer, *, when_failed: Callable[[QdistError], None] = _ignore) -> None:
        self.answerer, self._when_failed = answerer, when_failed
        self.failed: QdistError | None = None
        """What ended the work; None while all is well."""
        self._changed = Condition()
        self._inbox: list[Callable[[], None]] = []
        """What callers want done before the next step."""
        self._tickets, self._own = count(1), dict[int, int]()
        """The answerer's ticket by the runner's, of answers that have not ended; used on the runner's thread alone."""
        self._busy = self._draining = self._closing = False
        self._coming = 0
        """Questions that the answerer has not got yet."""
        self._thread = Thread(target=self._run, name="qdist answers", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Runner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def working(self) -> int:
        """Answers at work."""
        return self.answerer.working

    @property
    def waiting(self) -> int:
        """Questions in the line."""
        return self.answerer.waiting + self._coming

    def submit(self, question: Question, listener: Listener) -> int:
        """Put a question into the line; returns its ticket, which is the runner's and not the answerer's.

        Raises DataError for one that cannot be answered, JobError after `drain` or `close`, `failed` if it is set. What
        only the answerer itself refuses, later, ends with that error.
        """
        require_answerable(question, positions=self.answerer.positions, adapters=self.answerer.adapters)
        with self._changed:
            if self.failed:
                raise self.failed
            if self._draining or self._closing:
                raise JobError(
                    "no more questions are taken: answers at work are being finished",
                    try_="again once it has started anew",
                )
            ticket = next(self._tickets)
            self._coming += 1
            self._tell(lambda: self._submit(ticket, question, listener))
        return ticket

    def cancel(self, ticket: int) -> None:
        """End an answer before the next token; `Ended("cancelled")` is told. Nothing if it has ended."""
        with self._changed:
            self._tell(lambda: self._cancel(ticket))

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more questions, and wait until all answers have ended. False if that took more seconds than timeout.

        Raises `failed` if an error ended the work.
        """
        with self._changed:
            self._draining = True
            is_done = self._changed.wait_for(lambda: self.failed or not (self._busy or self._inbox), timeout)
            if self.failed:
                raise self.failed
        return bool(is_done)

    def close(self) -> None:
        """Cancel what is at work or in the line, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _tell(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        self._changed.notify_all()

    def _submit(self, ticket: int, question: Question, listener: Listener) -> None:
        def heard(news: Piece | Ended) -> None:
            if isinstance(news, Ended):
                self._own.pop(ticket, None)
            listener(news)

        try:
            self._own[ticket] = self.answerer.submit(question, heard)
        except DataError as error:
            listener(Ended("error", "", len(question.prompt), 0, error))

    def _cancel(self, ticket: int) -> None:
        if ticket in self._own:
            self.answerer.cancel(self._own[ticket])

    def _run(self) -> None:
        error: QdistError | None = JobError("a fault ended the work; its traceback was printed")
        try:
            self._work()
            error = None
        except QdistError as found:
            error = found
        except (RuntimeError, MemoryError) as found:
            error = JobError(f"answering failed: {found}")
            error.__cause__ = found
        finally:
            if error:
                self._fail(error)

    def _fail(self, error: QdistError) -> None:
        with self._changed:
            self.failed = error
            self._changed.notify_all()
        self._when_failed(error)

    def _work(self) -> None:
        while self._has_work():
            self._do_inbox()
            goes_on = self.answerer.step()
            with self._changed:
                self._busy = goes_on
                self._changed.notify_all()
        self._do_inbox()
        for ticket in tuple(self._own):
            self._cancel(ticket)

    def _has_work(self) -> bool:
        """Wait until there is something to do; False if the runner is being closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._busy or self._inbox or self._closing)
            return not self._closing

    def _do_inbox(self) -> None:
        with self._changed:
            commands, self._inbox = self._inbox, []
            self._coming, self._busy = 0, True
        for command in commands:
            command()
