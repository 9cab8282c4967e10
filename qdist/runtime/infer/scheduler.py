"""Answers many questions in one batch, which they join and leave at any token."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from qdist.runtime.infer.answerer import Listener, Question
from qdist.runtime.infer.choosing import Chooser
from qdist.runtime.infer.line import Answer, Line


class RowDecoder(Protocol):
    """What `decoder.Decoder` does for rows of its cache; it calls a `Chooser` with the logits of each."""

    def prefill(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        """Fill rows with prompts and choose what follows them."""

    def step(self, rows: int) -> None:
        """Bring the first rows one token on."""

    def move(self, source: int, target: int) -> None:
        """Copy a row over another."""


class AdapterRows:
    """Which adapter computes each row: its number, 0 for the base, in a device tensor that graphs read."""

    def __init__(self, numbers: Mapping[str, int], slots: int, device: torch.device) -> None:
        """numbers: of the adapters by their names, and of the base under the empty name."""
        self._numbers = numbers
        self.of_row = torch.zeros(slots, dtype=torch.int64, device=device)

    def put(self, row: int, name: str) -> None:
        """Give a row to an adapter."""
        self.of_row[row] = self._numbers[name]

    def move(self, source: int, target: int) -> None:
        """Have an answer go on in another row."""
        self.of_row[target] = self.of_row[source]


class Batched:
    """An `Answerer` whose answers at work are the first rows of a decoder's cache."""

    def __init__(self, decoder: RowDecoder, chooser: Chooser, line: Line, adapter_rows: AdapterRows) -> None:
        self._decoder, self._chooser, self._line, self._adapter_rows = decoder, chooser, line, adapter_rows
        self._rows: list[Answer] = []
        self.adapters, self.positions = line.adapters, line.positions
        self.slots = len(adapter_rows.of_row)

    @property
    def working(self) -> int:
        """Answers at work."""
        return sum(not answer.ended for answer in self._rows)

    @property
    def waiting(self) -> int:
        """Questions in the line."""
        return self._line.waiting

    def submit(self, question: Question, listener: Listener) -> int:
        """Put a question into the line; see `Answerer`."""
        return self._line.submit(question, listener)

    def cancel(self, ticket: int) -> None:
        """End an answer; see `Answerer`."""
        self._line.cancel(ticket)

    def step(self) -> bool:
        """Bring each answer at work one token on, and let in whom there is a row for; see `Answerer`.

        Both are launched before the host waits for either, and read in one copy.
        """
        self._compact()
        if self._rows:
            self._use()
            self._decoder.step(len(self._rows))
        self._let_in()
        if not self._rows:
            return False
        answers = tuple(self._rows)
        for answer, choice in zip(answers, self._chooser.read(len(answers)), strict=True):
            answer.take(choice)
        self._compact()
        return True

    def _let_in(self) -> None:
        first = len(self._rows)
        admitted = self._line.admit(self.slots - first)
        if not admitted:
            return
        rows = range(first, first + len(admitted))
        for row, answer in zip(rows, admitted, strict=True):
            self._chooser.admit(row, answer.question.sampling, answer.question.prompt)
            self._adapter_rows.put(row, answer.question.adapter)
        self._rows += admitted
        self._use()
        self._decoder.prefill([answer.question.prompt for answer in admitted], rows)

    def _use(self) -> None:
        self._chooser.use(answer.question.sampling for answer in self._rows)

    def _compact(self) -> None:
        """Have the last rows take the places of answers that ended."""
        for row in reversed(range(len(self._rows))):
            if self._rows[row].ended:
                self._line.forget(self._rows[row])
                last = len(self._rows) - 1
                if row < last:
                    for part in (self._decoder, self._chooser, self._adapter_rows):
                        part.move(last, row)
                    self._rows[row] = self._rows[last]
                self._rows.pop()
