"""A runner answers for callers on any thread, waits without computing, and tells what ended it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import pytest

from qdist.core.errors import DataError, JobError, QdistError
from qdist.runtime.infer.answerer import Ended, Listener, Piece, Question
from qdist.runtime.infer.runner import Runner
from tests.runtime.infer.answering import batched, one_by_one, question
from tests.runtime.tiny import tiny_model

SECONDS = 60.0


class Counting:
    """An answerer whose answers are 1, 2, 3, ...; a step waits until the test lets it go on."""

    adapters, slots, positions = ("a",), 2, 1000

    def __init__(self, *, goes: bool = True) -> None:
        self.may_step = Event()
        self.stepped = SimpleQueue[int]()
        self.error: Exception | None = None
        self._answers: dict[int, tuple[Question, Listener, int]] = {}
        self.steps = self._last = 0
        if goes:
            self.may_step.set()

    @property
    def working(self) -> int:
        return len(self._answers)

    waiting = 0

    def submit(self, question: Question, listener: Listener) -> int:
        if question.prompt[0] == 13:
            raise DataError("13 is not answered here")
        self._last += 1
        self._answers[100 + self._last] = (question, listener, 0)
        return 100 + self._last

    def cancel(self, ticket: int) -> None:
        if ticket in self._answers:
            self._end(ticket, "cancelled")

    def step(self) -> bool:
        self.steps += 1
        assert self.may_step.wait(SECONDS)
        if self.error:
            raise self.error
        for ticket, (asked, listener, count) in tuple(self._answers.items()):
            self._answers[ticket] = (asked, listener, count + 1)
            listener(Piece(count + 1, ""))
            if ticket in self._answers and count + 1 == asked.sampling.max_new_tokens:
                self._end(ticket, "length")
        return bool(self._answers)

    def _end(self, ticket: int, reason: Any) -> None:
        asked, listener, count = self._answers.pop(ticket)
        listener(Ended(reason, "", len(asked.prompt), count))


class Waited:
    """A listener for another thread."""

    def __init__(self) -> None:
        self._news = SimpleQueue[Piece | Ended]()
        self.tokens: list[int] = []

    def __call__(self, news: Piece | Ended) -> None:
        self._news.put(news)

    def first(self) -> Piece | Ended:
        return self._news.get(timeout=SECONDS)

    def ended(self) -> Ended:
        while not isinstance(news := self.first(), Ended):
            self.tokens.append(news.token)
        return news


def test_questions_from_many_threads_are_all_answered() -> None:
    waited = [[Waited() for _ in range(20)] for _ in range(8)]
    with Runner(Counting()) as runner:

        def ask(own: list[Waited]) -> None:
            for count, listener in enumerate(own, 1):
                runner.submit(question(max_new_tokens=count), listener)

        threads = [Thread(target=ask, args=(own,)) for own in waited]
        for thread in threads:
            thread.start()
        for own in waited:
            for count, listener in enumerate(own, 1):
                assert listener.ended().new_tokens == count
                assert listener.tokens == list(range(1, count + 1))
        for thread in threads:
            thread.join()


def test_a_real_model_answers_the_same_from_a_thread() -> None:
    model = tiny_model()
    found = list[list[int]]()
    for answerer in (batched(model, slots=2), one_by_one(model, slots=3)):
        with Runner(answerer) as runner:
            waited = [Waited() for _ in range(5)]
            for place, listener in enumerate(waited):
                runner.submit(question(5 + place, 9, temperature=1.0, seed=place), listener)
            assert runner.drain(SECONDS)
            for listener in waited:
                listener.ended()
            found.append([token for listener in waited for token in listener.tokens])
    assert found[0] == found[1]
    assert len(found[0]) == 5 * 8


def test_an_answer_is_cancelled_from_another_thread_and_its_ticket_is_the_runners() -> None:
    with Runner(Counting()) as runner:
        listener, other = Waited(), Waited()
        ticket = runner.submit(question(max_new_tokens=10**9), listener)
        listener.first()
        runner.submit(question(max_new_tokens=3), other)
        other.ended()
        runner.cancel(ticket)
        runner.cancel(ticket)
        runner.cancel(12345)
        assert listener.ended().reason == "cancelled"


def test_nothing_is_computed_while_there_is_nothing_to_do() -> None:
    answerer = Counting()
    with Runner(answerer) as runner:
        for _ in range(3):
            listener = Waited()
            runner.submit(question(max_new_tokens=2), listener)
            listener.ended()
        assert answerer.steps <= 9
    assert not runner._thread.is_alive()


def test_questions_that_cannot_be_answered_are_refused_at_once() -> None:
    answerer = Counting(goes=False)
    with Runner(answerer) as runner:
        runner.submit(question(), Waited())
        for asked in (Question([]), Question([5] * 1000), question(adapter="b")):
            with pytest.raises(DataError):
                runner.submit(asked, Waited())
        answerer.may_step.set()


def test_what_only_the_answerer_refuses_ends_with_its_error() -> None:
    with Runner(Counting()) as runner:
        listener = Waited()
        runner.submit(question(13), listener)
        ended = listener.ended()
        assert (ended.reason, ended.prompt_tokens, ended.new_tokens) == ("error", 1, 0)
        assert isinstance(ended.error, DataError)


def test_draining_finishes_what_was_asked_and_takes_nothing_new() -> None:
    answerer = Counting(goes=False)
    with Runner(answerer) as runner:
        waited = [Waited() for _ in range(3)]
        for listener in waited:
            runner.submit(question(max_new_tokens=5), listener)
        assert not runner.drain(0)
        with pytest.raises(JobError, match="no more questions are taken"):
            runner.submit(question(), Waited())
        answerer.may_step.set()
        assert runner.drain(SECONDS)
        assert [listener.ended().reason for listener in waited] == ["length"] * 3


def test_closing_cancels_what_is_at_work() -> None:
    with Runner(Counting()) as runner:
        listener = Waited()
        runner.submit(question(max_new_tokens=10**9), listener)
        listener.first()
    assert listener.ended().reason == "cancelled"
    with pytest.raises(JobError):
        runner.submit(question(), listener)


@contextmanager
def broken(error: Exception) -> Iterator[tuple[Runner, QdistError]]:
    """A runner whose answerer has raised, and what it told of that."""
    answerer, told = Counting(goes=False), SimpleQueue[QdistError]()
    answerer.error = error
    when_failed: Callable[[QdistError], None] = told.put
    with Runner(answerer, when_failed=when_failed) as runner:
        runner.submit(question(), Waited())
        answerer.may_step.set()
        yield runner, told.get(timeout=SECONDS)


@pytest.mark.parametrize("error", [JobError("logits are NaN at token 3"), RuntimeError("CUDA is out of memory")])
def test_an_error_ends_the_work_and_is_told_to_whoever_asks(error: Exception) -> None:
    with broken(error) as (runner, told):
        assert runner.failed is told
        assert str(error) in told.message
        for call in (lambda: runner.submit(question(), Waited()), runner.drain):
            with pytest.raises(QdistError, match=str(error)):
                call()
        runner.cancel(1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_keeps_its_traceback_and_leaves_nobody_waiting() -> None:
    with broken(KeyError("a fault")) as (runner, told):
        assert runner.failed is told
        assert isinstance(told, JobError)
        runner._thread.join(SECONDS)
