"""Puts the questions of requests to the answerer, and brings back what is answered; who goes away frees the place."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from qdist.core.errors import DataError, QdistError
from qdist.runtime.infer.answerer import Ended, Piece, Question
from qdist.runtime.infer.runner import Runner
from qdist.runtime.serve.asking import Served
from qdist.runtime.serve.meters import Meters, Timer
from qdist.runtime.serve.refusals import Refusal

T = TypeVar("T")


class Told(NamedTuple):
    """What was heard of one of a request's questions."""

    choice: int
    """Which of them, from 0."""
    what: Piece | Ended


class Desk:
    """Takes questions in from the event loop's thread. A place is held from the request until its answers have ended.

    models: by the name that clients give. most: answers at work and in line, at most.
    """

    def __init__(self, runner: Runner, models: Mapping[str, Served], meters: Meters, *, most: int) -> None:
        self.models, self.positions = models, runner.answerer.positions
        self._runner, self._meters, self._most = runner, meters, most
        self._held = 0
        self._open: set[Answers] = set()
        # One thread: a tokenizer is not for several, and the time that prompts take stays bounded.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizing")

    def hold(self, count: int) -> "Place":
        """Places for so many answers. Raises Refusal: 429 if too many are at work and in line."""
        if count > self._most:
            raise Refusal(f"it asks for {count:,} answers at once, and {self._most:,} have a place", try_="a smaller n")
        if self._held + count > self._most:
            ahead = self._held + count - self._most
            wait = self._meters.wait_s(ahead, self._runner.answerer.slots)
            raise Refusal(
                f"{self._held:,} answers are at work or in line, and {self._most:,} have a place",
                try_=f"again in {wait:.0f} s",
                status=429,
                code="queue_full",
                retry_after_s=wait,
            )
        self._held += count
        return Place(self._release, count)

    def _release(self, count: int) -> None:
        self._held -= count

    async def tokenized(self, work: Callable[[], T]) -> T:
        """The result of work that takes time, done off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    def ask(self, questions: Sequence[Question], place: "Place") -> "Answers":
        """Put questions into the line. Raises Refusal for one that cannot be answered."""
        answers = Answers(self._runner, place, self._meters, len(questions))
        self._open.add(answers)
        answers.closing.append(lambda: self._open.discard(answers))
        try:
            for question in questions:
                answers.submit(question)
        except DataError as error:
            answers.close()
            raise Refusal(error.message, try_=error.try_) from error
        except QdistError as error:
            answers.close()
            raise failure(error) from error
        return answers

    def figures(self) -> str:
        """The figures of `/metrics`."""
        return self._meters.text(working=self._runner.working, waiting=self._runner.waiting)

    @property
    def idle(self) -> bool:
        """Whether no request has a place."""
        return not self._held

    def fail(self, error: QdistError) -> None:
        """Tell all that wait that the answerer has failed, and that no more will come."""
        for answers in tuple(self._open):
            answers.fail(error)

    def close(self) -> None:
        """End the thread that tokenizes."""
        self._tokenizing.shutdown(cancel_futures=True)


class Place:
    """Places of a request, given back one by one or all at once."""

    def __init__(self, release: Callable[[int], None], count: int) -> None:
        self._release, self._left = release, count

    def release(self, count: int | None = None) -> None:
        """Give some back, or what is left."""
        back = self._left if count is None else min(count, self._left)
        self._left -= back
        self._release(back)


class Answers:
    """The answers to one request as they come. To be closed: what has not ended by then is cancelled."""

    def __init__(self, runner: Runner, place: Place, meters: Meters, count: int) -> None:
        self._runner, self._place, self._meters = runner, place, meters
        self._loop, self._heard = asyncio.get_running_loop(), asyncio.Queue[Told | QdistError]()
        self._count, self._timers = count, [Timer() for _ in range(count)]
        self._tickets: dict[int, int] = {}
        """Of questions that have not ended, by index."""
        self.closing: list[Callable[[], object]] = []

    def submit(self, question: Question) -> None:
        """Put the next question into the line."""
        index = len(self._tickets)
        self._tickets[index] = self._runner.submit(question, lambda what: self._hear(Told(index, what)))

    def _hear(self, told: Told) -> None:
        """Called on the runner's thread."""
        self._loop.call_soon_threadsafe(self._take, told)

    def _take(self, told: Told) -> None:
        """An answer that has ended gives its place back, however slowly the client reads it."""
        if isinstance(told.what, Piece):
            self._timers[told.choice].token()
        else:
            self._end(told.choice)
        self._heard.put_nowait(told)

    def fail(self, error: QdistError) -> None:
        """Wake who waits with an error."""
        self._heard.put_nowait(error)

    async def told(self) -> AsyncIterator[Told]:
        """Everything that is heard, until the last answer has ended. Raises Refusal if one or the answerer fails."""
        left = self._count
        while left:
            heard = await self._heard.get()
            if isinstance(heard, QdistError):
                raise failure(heard)
            if isinstance(heard.what, Ended):
                left -= 1
                if heard.what.error:
                    raise _of_answer(heard.what.error)
            yield heard

    def _end(self, index: int) -> None:
        if self._tickets.pop(index, None) is not None:
            self._meters.answer(self._timers[index])
            self._place.release(1)

    def close(self) -> None:
        """Cancel what has not ended, and give the places back."""
        for index, ticket in tuple(self._tickets.items()):
            self._runner.cancel(ticket)
            self._end(index)
        self._place.release()
        for each in self.closing:
            each()


def _of_answer(error: QdistError) -> Refusal:
    """What a request is told when one of its answers cannot go on; others do."""
    if isinstance(error, DataError):
        return Refusal(error.message, try_=error.try_)
    return Refusal(error.message, try_=error.try_, status=500, code="answer_failed")


def failure(error: QdistError) -> Refusal:
    """What a request is told when the model can answer no more."""
    return Refusal(f"the model stopped: {error.message}", try_="the server's log", status=503, code="failed")
