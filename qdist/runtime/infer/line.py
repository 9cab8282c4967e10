"""Questions in line and answers at work: what each answerer keeps of them, however its model computes."""

from collections import deque
from collections.abc import Collection, Mapping
from itertools import count

from qdist.core.errors import DataError, JobError, QdistError, nearest
from qdist.core.planning.answering import PROMPT_TOKENS
from qdist.runtime.infer.answerer import Ended, Likely, Listener, Piece, Question, Reason
from qdist.runtime.infer.choosing import Choice
from qdist.runtime.infer.decoding import as_written
from qdist.runtime.infer.text import AnswerText, Script


def require_answerable(question: Question, *, positions: int, adapters: Collection[str]) -> None:
    """Raise DataError for a question that an answerer with these positions and adapters cannot answer."""
    prompted = len(question.prompt)
    if not prompted:
        raise DataError("the prompt has no tokens", try_="a prompt with a word in it")
    if prompted >= positions:
        raise DataError(
            f"the prompt has {prompted:,} tokens, and there are {positions:,} positions for prompt and answer",
            try_="a shorter prompt",
        )
    if question.adapter and question.adapter not in adapters:
        near = nearest(question.adapter, adapters) or ", ".join(adapters)
        raise DataError(f"there is no adapter called {question.adapter!r}", try_=near or "the base: no adapter's name")


class Answer:
    """An answer from its question to its end."""

    def __init__(self, ticket: int, question: Question, listener: Listener, script: Script, positions: int) -> None:
        self.ticket, self.question, self._listener, self._script = ticket, question, listener, script
        sampling = question.sampling
        self._most = min(sampling.max_new_tokens, positions - len(question.prompt))
        ends: Collection[int] = () if sampling.ignore_end else script.ends
        self._ends, own = frozenset(ends), () if sampling.ignore_end else (script.end_text,)
        self._text = AnswerText(script.tokenizer, (*sampling.stop, *own))
        self._chosen = self._written = 0
        self.ended = False
        """Whether the listener has heard the end."""
        self.needs_no_more = False
        """Whether it ends with the last token that was noted, if not before."""
        self.spoiled = False
        """Whether its logits were NaN: so may be what is kept of it."""

    def note(self, choice: Choice) -> None:
        """Look at the next token without telling of it: `take` does, in the same order, now or later."""
        self._chosen += 1
        self.spoiled = self.spoiled or not choice.is_finite
        self.needs_no_more = choice.token in self._ends or self._chosen >= self._most or self.spoiled

    def take(self, choice: Choice) -> None:
        """Tell the listener of the next token, or of the end that it brings; logits that are NaN are one."""
        if self.ended:
            return
        if not choice.is_finite:
            self.fail(
                JobError(
                    f"logits are NaN or infinite at token {self._written + 1:,} of an answer (ticket {self.ticket}, "
                    f"after {len(self.question.prompt):,} tokens of prompt)",
                    try_="the base without the adapter, which tells whether the adapter is at fault",
                )
            )
            return
        if choice.token in self._ends:
            self.end("stop")
            return
        self._written += 1
        self._listener(self._piece(choice))
        if self._text.stopped:
            self.end("stop")
        elif self._written >= self._most:
            self.end("length")

    def fail(self, error: QdistError) -> None:
        """End it for an error that is this answer's alone."""
        self.end("error", error)

    def end(self, reason: Reason, error: QdistError | None = None) -> None:
        """Tell the listener that no more comes; nothing if it has heard that already."""
        if not self.ended:
            self.ended = True
            rest = self._text.finish()
            self._listener(Ended(reason, rest, len(self.question.prompt), self._written, error))

    def _piece(self, choice: Choice) -> Piece:
        text, asked = self._text.add(choice.token), self.question.sampling.logprobs
        if asked < 0:
            return Piece(choice.token, text)
        likely = tuple(
            Likely(token, as_written(self._script.tokenizer, [token]), logprob)
            for token, logprob in choice.likely[:asked]
        )
        return Piece(choice.token, text, choice.logprob, likely)


class Line:
    """Tickets, and the questions that wait for a place."""

    def __init__(self, scripts: Mapping[str, Script], positions: int, vocabulary: int | None = None) -> None:
        """scripts: of each adapter by its name, and of the base under the empty name.

        vocabulary: tokens that the model reads; None if unknown. A GPU that looks up another one ends for good.
        """
        self._vocabulary = vocabulary
        self.adapters = tuple(filter(None, scripts))
        self.positions = positions
        self._scripts, self._tickets = scripts, count(1)
        self._waiting, self._known = deque[Answer](), dict[int, Answer]()

    @property
    def waiting(self) -> int:
        """Questions in the line."""
        return len(self._waiting)

    def submit(self, question: Question, listener: Listener) -> int:
        """Put a question at the end; returns its ticket. Raises DataError for one that cannot be answered."""
        require_answerable(question, positions=self.positions, adapters=self.adapters)
        if self._vocabulary is not None and not 0 <= min(question.prompt) <= max(question.prompt) < self._vocabulary:
            token = max(question.prompt) if min(question.prompt) >= 0 else min(question.prompt)
            raise DataError(
                f"the prompt has the token {token:,}, and the model reads {self._vocabulary:,} of them",
                try_="a prompt without special tokens that the model has no row for",
            )
        ticket = next(self._tickets)
        answer = Answer(ticket, question, listener, self._scripts[question.adapter], self.positions)
        self._waiting.append(answer)
        self._known[ticket] = answer
        return ticket

    def cancel(self, ticket: int) -> None:
        """End an answer, in the line or at work; nothing if it has ended."""
        answer = self._known.pop(ticket, None)
        if answer is None:
            return
        if answer in self._waiting:
            self._waiting.remove(answer)
        answer.end("cancelled")

    def admit(self, places: int, adapter: str | None = None) -> list[Answer]:
        """The next answers in order that there are places for, with `PROMPT_TOKENS` of prompts at most.

        adapter: let nobody in from the first question on that is for another one.
        """
        admitted, tokens = list[Answer](), 0
        while self._waiting and len(admitted) < places:
            question = self._waiting[0].question
            tokens += len(question.prompt)
            if (admitted and tokens > PROMPT_TOKENS) or adapter not in (None, question.adapter):
                break
            admitted.append(self._waiting.popleft())
        return admitted

    @property
    def next_adapter(self) -> str:
        """The adapter that the first question in the line is for; empty if there is none."""
        return self._waiting[0].question.adapter if self._waiting else ""

    def forget(self, answer: Answer) -> None:
        """Drop an answer that has ended."""
        self._known.pop(answer.ticket, None)


class AtLine:
    """What every answerer with a `Line` does alike."""

    def __init__(self, line: Line, slots: int) -> None:
        self.line, self.slots = line, slots
        self.adapters, self.positions = line.adapters, line.positions

    @property
    def waiting(self) -> int:
        """Questions in the line."""
        return self.line.waiting

    def submit(self, question: Question, listener: Listener) -> int:
        """Put a question into the line; see `Answerer`."""
        return self.line.submit(question, listener)

    def cancel(self, ticket: int) -> None:
        """End an answer; see `Answerer`."""
        self.line.cancel(ticket)
