"""An answerer that says what a test wrote: a piece of each answer a step, whoever asks."""

from collections.abc import Callable, Iterable, Iterator

from qdist.core.errors import QdistError
from qdist.runtime.infer.answerer import Ended, Listener, Piece, Question, Reason

Said = str | QdistError | Callable[[], str]
"""The text of a token; or an error to raise in its place; or what gives the text."""


class Scripted:
    """Answers with the tokens that `reply` gives for a question."""

    def __init__(
        self,
        reply: Callable[[Question], Iterable[Said]],
        *,
        slots: int = 2,
        positions: int = 128,
        adapters: tuple[str, ...] = ("adapter",),
    ) -> None:
        self.slots, self.positions, self.adapters = slots, positions, adapters
        self.questions: list[Question] = []
        self.most_working = 0
        self._reply = reply
        self._line: dict[int, tuple[Question, Listener, Iterator[Said]]] = {}
        self._said: dict[int, int] = {}

    def submit(self, question: Question, listener: Listener) -> int:
        self.questions.append(question)
        ticket = len(self.questions)
        self._line[ticket], self._said[ticket] = (question, listener, iter(self._reply(question))), 0
        return ticket

    def cancel(self, ticket: int) -> None:
        if ticket in self._line:
            self._end(ticket, "cancelled")

    def step(self) -> bool:
        at_work = list(self._line)[: self.slots]
        self.most_working = max(self.most_working, len(at_work))
        for ticket in at_work:
            self._advance(ticket)
        return bool(at_work)

    def _advance(self, ticket: int) -> None:
        question, listener, left = self._line[ticket]
        said = next(left, None)
        if said is None:
            self._end(ticket, "stop")
            return
        if isinstance(said, QdistError):
            raise said
        self._said[ticket] += 1
        listener(Piece(self._said[ticket], said if isinstance(said, str) else said()))
        if self._said[ticket] == question.sampling.max_new_tokens:
            self._end(ticket, "length")

    def _end(self, ticket: int, reason: Reason) -> None:
        question, listener, _ = self._line.pop(ticket)
        listener(Ended(reason, "", len(question.prompt), self._said[ticket]))

    @property
    def working(self) -> int:
        return min(self.slots, len(self._line))

    @property
    def waiting(self) -> int:
        return len(self._line) - self.working
