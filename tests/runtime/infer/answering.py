"""A tokenizer, answerers over tiny models, and what is heard from them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qdist.core.sampling import Sampling
from qdist.runtime.infer.answerer import Answerer, Ended, Piece, Question
from qdist.runtime.infer.choosing import Chooser
from qdist.runtime.infer.decoder import Choose, Decoder
from qdist.runtime.infer.line import Line
from qdist.runtime.infer.one_by_one import OneByOne
from qdist.runtime.infer.scheduler import AdapterRows, Batched, RowDecoder
from qdist.runtime.infer.text import Script
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.infer.test_decoder import launched_anew
from tests.runtime.tiny import VOCAB

CPU = torch.device("cpu")


class Heard:
    """A listener that keeps all it is told."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.ended: Ended | None = None

    def __call__(self, news: Piece | Ended) -> None:
        assert self.ended is None, "nothing comes after the end"
        if isinstance(news, Ended):
            self.ended = news
        else:
            self.pieces.append(news)

    @property
    def tokens(self) -> list[int]:
        return [piece.token for piece in self.pieces]

    @property
    def text(self) -> str:
        assert self.ended is not None
        return "".join(piece.text for piece in self.pieces) + self.ended.text


class ByAnswer:
    """A decoder of rows that reads each row's tokens from the start: what its cache must amount to."""

    def __init__(self, model: Any, choose: Choose, slots: int) -> None:
        self._model, self._choose = model, choose
        self.rows: list[list[int]] = [[] for _ in range(slots)]

    def prefill(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        for prompt, row in zip(prompts, rows, strict=True):
            self.rows[row] = list(prompt)
        self._go_on(rows)

    def step(self, rows: int) -> None:
        self._go_on(range(rows))

    def move(self, source: int, target: int) -> None:
        self.rows[target] = list(self.rows[source])

    def clear(self, row: int) -> None:
        self.rows[row] = []

    def _go_on(self, rows: Sequence[int]) -> None:
        with torch.no_grad():
            logits = [self._model(input_ids=torch.tensor([self.rows[row]])).logits[0, -1] for row in rows]
        for row, token in zip(rows, self._choose(torch.stack(logits), torch.tensor(list(rows))).tolist(), strict=True):
            self.rows[row].append(token)


def line_of(*adapters: str, positions: int = 48, ends: Sequence[int] = (1,), end_text: str = "") -> Line:
    script = Script(tiny_tokenizer(bos=False), ends, end_text)
    return Line(dict.fromkeys(("", *adapters), script), positions)


def batched(model: Any, *, slots: int = 4, line: Line | None = None) -> Batched:
    line = line or line_of()
    return _in_rows(lambda chooser: ByAnswer(model, chooser, slots), line, slots)


def by_rows(model: Any, *, slots: int = 4, line: Line | None = None) -> Batched:
    """As `batched`, by the decoder that models have."""
    own = line or line_of()
    return _in_rows(lambda chooser: Decoder(model, slots=slots, positions=own.positions, choose=chooser), own, slots)


def captured(model: Any, *, slots: int = 4, line: Line | None = None) -> Batched:
    """As on a GPU, but for the graph: prompts are padded, and so are rows."""
    own = line or line_of()

    def make(chooser: Chooser) -> Decoder:
        decoder = Decoder(
            model, slots=slots, positions=own.positions, choose=chooser, new_pool=launched_anew,
            variant=lambda: chooser.variant,
        )  # fmt: skip
        decoder.prepare()
        return decoder

    return _in_rows(make, own, slots, tells_later=True)


def told_later(model: Any, *, slots: int = 4, line: Line | None = None) -> Batched:
    """As on a GPU."""
    line = line or line_of()
    return _in_rows(lambda chooser: ByAnswer(model, chooser, slots), line, slots, tells_later=True)


def _in_rows(make: Callable[[Chooser], RowDecoder], line: Line, slots: int, *, tells_later: bool = False) -> Batched:
    chooser = Chooser(slots, VOCAB, CPU)
    return Batched(make(chooser), chooser, line, rows_of(line, slots), slots=slots, tells_later=tells_later)


def rows_of(line: Line, slots: int) -> AdapterRows:
    """Where all adapters are the base."""
    numbers = dict.fromkeys(("", *line.adapters), 0)
    return AdapterRows(numbers, slots, CPU, select=lambda _: None, set_rows=lambda _: None)


def one_by_one(model: Any, *, slots: int = 4, line: Line | None = None) -> OneByOne:
    return OneByOne(model, Chooser(slots, VOCAB, CPU), line or line_of(), slots=slots, select=lambda _: None)


def answered(answerer: Answerer, *questions: Question) -> list[Heard]:
    """All answers, asked at once."""
    heard = [Heard() for _ in questions]
    for question, listener in zip(questions, heard, strict=True):
        answerer.submit(question, listener)
    finish(answerer)
    return heard


def finish(answerer: Answerer) -> None:
    """Go on until all have ended."""
    while answerer.step():
        pass


def question(*prompt: int, adapter: str = "", **sampling: Any) -> Question:
    return Question(prompt or (5, 9), Sampling(**{"max_new_tokens": 8, **sampling}), adapter)
