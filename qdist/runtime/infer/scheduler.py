"""Answers many questions in one batch, which they join and leave at any token."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch

from qdist.runtime.infer.choosing import Choice, Chooser
from qdist.runtime.infer.line import Answer, AtLine, Line


class RowDecoder(Protocol):
    """What `decoder.Decoder` does for rows of its cache; it calls a `Chooser` with the logits of each."""

    def prefill(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        """Fill rows with prompts and choose what follows them."""

    def step(self, rows: int) -> None:
        """Bring the first rows one token on."""

    def move(self, source: int, target: int) -> None:
        """Copy a row over another."""

    def clear(self, row: int) -> None:
        """Forget what a row held, of which NaN would reach the answer that has it next."""


Select = Callable[[str], None]
"""Has the adapter of this name compute all that comes, or the base alone if empty."""
SetRows = Callable[[torch.Tensor], None]
"""Has the adapters of these numbers compute the next tokens, int64 [tokens]. A graph may capture it."""


class AdapterRows:
    """Which adapter computes each row. A decoder calls it before each pass with the rows that tokens are of.

    numbers: of the adapters by their names, and 0 of the base under the empty name.
    set_rows: None where rows of one pass cannot have adapters of their own.
    """

    def __init__(
        self, numbers: Mapping[str, int], slots: int, device: torch.device, select: Select, set_rows: SetRows | None
    ) -> None:
        self._numbers, self._select, self._set_rows = numbers, select, set_rows
        self._of_row = torch.zeros(slots, dtype=torch.int64, device=device)
        self.mixes = set_rows is not None
        """Whether the rows of one pass may have different adapters."""
        self.variant: str | None = None
        """The adapter of all rows, or None if each has its own: a graph is captured for each value."""
        self.use({""})

    def use(self, names: Collection[str]) -> None:
        """Compute with these adapters from now on, with one alone faster than with several.

        One of several is never alone where rows may differ: its matrices would be copied, at another place each time,
        and graphs know only the first.
        """
        is_alone = len(names) == 1 and (not self.mixes or max(self._numbers.values()) < 2)
        only = next(iter(names)) if is_alone else None
        if only != self.variant:
            self.variant = only
            if only is not None:
                self._select(only)

    def put(self, row: int, name: str) -> None:
        """Give a row to an adapter."""
        self._of_row[row] = self._numbers[name]

    def move(self, source: int, target: int) -> None:
        """Have an answer go on in another row."""
        self._of_row[target] = self._of_row[source]

    def __call__(self, rows: torch.Tensor) -> None:
        """Choose the adapters of the next tokens by their rows, int64 [tokens]."""
        if self.variant is None and self._set_rows:
            self._set_rows(self._of_row[rows])


class Batched(AtLine):
    """An `Answerer` whose answers at work are the first rows of a decoder's cache.

    tells_later: tell of a step's tokens while the device computes the next one. Text costs the host 20 us a token.
    For it an answer that a stop text ends is computed a token too far, which nobody hears.
    """

    def __init__(
        self,
        decoder: RowDecoder,
        chooser: Chooser,
        line: Line,
        adapter_rows: AdapterRows,
        *,
        slots: int,
        tells_later: bool = False,
    ) -> None:
        super().__init__(line, slots)
        self._decoder, self._chooser, self._adapter_rows = decoder, chooser, adapter_rows
        self._tells_later = tells_later
        self._rows: list[Answer] = []
        self._untold: list[tuple[Answer, Choice]] = []

    @property
    def working(self) -> int:
        """Answers at work."""
        return sum(not answer.ended for answer in self._rows)

    def step(self) -> bool:
        """Bring each answer at work one token on, and let in whom there is a row for; see `Answerer`.

        Both are launched before the host waits for either, and read in one copy.
        """
        self._compact()
        if self._rows:
            self._use()
            self._decoder.step(len(self._rows))
        self._let_in()
        self._tell()
        if not self._rows:
            return False
        self._untold = list(zip(self._rows, self._chooser.read(len(self._rows)), strict=True))
        for answer, choice in self._untold:
            answer.note(choice)
        if not self._tells_later:
            self._tell()
        self._compact()
        return True

    def _tell(self) -> None:
        untold, self._untold = self._untold, []
        for answer, choice in untold:
            answer.take(choice)

    def _let_in(self) -> None:
        first, only = len(self._rows), None
        if not self._adapter_rows.mixes:
            only = self._rows[0].question.adapter if self._rows else self.line.next_adapter
        admitted = self.line.admit(self.slots - first, only)
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
        self._adapter_rows.use({answer.question.adapter for answer in self._rows})

    def _compact(self) -> None:
        """Have the last rows take the places of answers that ended."""
        for row in reversed(range(len(self._rows))):
            if self._rows[row].ended or self._rows[row].needs_no_more:
                self.line.forget(self._rows[row])
                if self._rows[row].spoiled:
                    self._decoder.clear(row)
                last = len(self._rows) - 1
                if row < last:
                    for part in (self._decoder, self._chooser, self._adapter_rows):
                        part.move(last, row)
                    self._rows[row] = self._rows[last]
                self._rows.pop()
