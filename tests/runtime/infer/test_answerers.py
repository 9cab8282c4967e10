"""Questions join and leave at any token, and each is answered as if it were alone."""

import random
from typing import Any

import pytest
import torch

from qdist.core.errors import DataError, JobError
from qdist.core.planning.answering import PROMPT_TOKENS
from qdist.core.sampling import Sampling
from qdist.runtime.infer.answerer import Answerer, Ended, Likely, Question
from qdist.runtime.infer.choosing import Chooser
from qdist.runtime.infer.line import Line
from qdist.runtime.infer.one_by_one import OneByOne
from qdist.runtime.infer.scheduler import AdapterRows, Batched
from qdist.runtime.infer.text import Script
from tests.runtime.infer.answering import (
    ByAnswer,
    Heard,
    answered,
    batched,
    by_rows,
    captured,
    finish,
    line_of,
    one_by_one,
    question,
    told_later,
)
from tests.runtime.tiny import VOCAB, tiny_model

KINDS = (batched, told_later, by_rows, captured, one_by_one)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def some_questions(count: int, *, seed: int = 0) -> list[Question]:
    drawn = random.Random(seed)
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "logprobs": 2},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"temperature": 1.5, "min_p": 0.05, "top_k": 40},
    ]
    return [
        Question(
            [drawn.randrange(5, VOCAB) for _ in range(drawn.randint(1, 20))],
            Sampling(max_new_tokens=drawn.randint(1, 16), seed=drawn.randrange(2**40), **drawn.choice(settings)),
        )
        for _ in range(count)
    ]


def likeliest(found: Heard) -> list[Likely]:
    return [likely for piece in found.pieces for likely in piece.likely]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
def test_answers_that_join_leave_and_are_cancelled_at_random_are_those_of_questions_alone(
    kind: Any, model: Any
) -> None:
    questions, drawn = some_questions(64), random.Random(1)
    answerer: Answerer = kind(model, slots=5)
    heard, tickets = [Heard() for _ in questions], list[int]()
    while True:
        for _ in range(drawn.choice((0, 0, 1, 3))):
            if len(tickets) < len(questions):
                tickets.append(answerer.submit(questions[len(tickets)], heard[len(tickets)]))
        if tickets and drawn.random() < 0.1:
            answerer.cancel(drawn.choice(tickets))
        assert answerer.working <= answerer.slots
        if not answerer.step() and len(tickets) == len(questions):
            break
    reasons = set[str]()
    for asked, found in zip(questions, heard, strict=True):
        (alone,) = answered(one_by_one(model, slots=1), asked)
        assert found.ended
        reasons.add(found.ended.reason)
        if found.ended.reason == "cancelled":
            assert alone.tokens[: len(found.tokens)] == found.tokens
        else:
            assert (found.tokens, found.text) == (alone.tokens, alone.text)
            assert [likely.token for likely in likeliest(found)] == [likely.token for likely in likeliest(alone)]
    assert {"length", "cancelled"} <= reasons


@pytest.mark.parametrize("family", ["llama", "bloom", "opt", "gpt_neox", "olmo2"])
def test_greedy_answers_are_transformers_own(family: str) -> None:
    model = tiny_model(family)
    prompts = [[5, 9, 11], [7], list(range(5, 25))]
    for prompt, found in zip(prompts, answered(one_by_one(model), *(question(*p) for p in prompts)), strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=2
        )
        assert found.tokens == [token for token in out[0, len(prompt) :].tolist() if token != 1]


def test_a_recurrent_model_answers_one_by_one() -> None:
    model = tiny_model(
        "mamba", hidden_size=32, num_hidden_layers=2, state_size=4, intermediate_size=64, time_step_rank=2
    )
    first, second = answered(one_by_one(model), question(5, 9), question(7, 8, 6))
    assert [len(first.tokens), len(second.tokens)] == [8, 8]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[7, 8, 6, *second.tokens[:-1]]])).logits
    assert second.tokens == logits[0, 2:].argmax(-1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_where_it_should(kind: Any, model: Any) -> None:
    (plain,) = answered(kind(model), question())
    third = plain.tokens[2]
    cases = [
        (line_of(ends=(third,)), question(), "stop", plain.tokens.index(third)),
        (line_of(ends=(third,)), question(ignore_end=True), "length", 8),
        (line_of(positions=5), question(), "length", 3),
        (line_of(), question(max_new_tokens=1), "length", 1),
    ]
    for line, asked, reason, count in cases:
        (found,) = answered(kind(model, line=line), asked)
        assert found.ended
        assert (found.ended.reason, found.tokens) == (reason, plain.tokens[:count])
        assert found.ended.new_tokens == count
        assert found.ended.prompt_tokens == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_text_ends_an_answer_and_is_not_told(kind: Any, model: Any) -> None:
    (plain,) = answered(kind(model), question(max_new_tokens=12))
    stop = plain.text[3:5]
    (found,) = answered(kind(model), question(max_new_tokens=12, stop=(stop,)))
    assert found.ended
    assert (found.ended.reason, found.text) == ("stop", plain.text.partition(stop)[0])
    (also,) = answered(kind(model, line=line_of(end_text=stop)), question(max_new_tokens=12))
    assert also.text == found.text


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_nan_name_the_token_and_the_answer(kind: Any) -> None:
    model = tiny_model()
    answerer, heard = kind(model), Heard()
    answerer.submit(question(), heard)
    answerer.step()
    assert heard.ended is None
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    finish(answerer)
    assert heard.ended
    assert (heard.ended.reason, heard.ended.new_tokens) == ("error", 1)
    assert isinstance(heard.ended.error, JobError)
    assert "NaN or infinite at token 2 of an answer (ticket 1, after 2 tokens" in heard.ended.error.message


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_with_logits_that_are_nan_harms_none_beside_or_after_it(kind: Any) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[66] = torch.nan
    asked = [question(*[66] * 12), question(5, 9, max_new_tokens=16), question(6, 7), question(*[66] * 3), question(8)]
    bad, *good = answered(kind(model, slots=2), *asked)
    assert bad.ended
    assert (bad.ended.reason, bad.tokens) == ("error", [])
    alone = [answered(one_by_one(model), own)[0] for own in asked[1:]]
    assert [own.tokens for own in good] == [own.tokens for own in alone]
    assert [own.ended and own.ended.reason for own in good] == ["length", "length", "error", "length"]


@pytest.mark.parametrize("kind", KINDS)
def test_questions_that_cannot_be_answered_are_refused(kind: Any, model: Any) -> None:
    answerer = kind(model, line=line_of("french", positions=8))
    for asked, said in (
        (Question([]), "has no tokens"),
        (question(*range(5, 13)), "8 tokens, and there are 8 positions"),
        (question(adapter="frensh"), "no adapter called 'frensh'"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            answerer.submit(asked, Heard())
        assert caught.value.try_
    assert not answerer.step()


def test_a_token_that_the_model_does_not_read_is_refused() -> None:
    line = Line({"": Script(None)}, 8, VOCAB)
    for token in (VOCAB, -1):
        with pytest.raises(DataError, match=f"has the token {token}, and the model reads {VOCAB}"):
            line.submit(question(5, token), Heard())


@pytest.mark.parametrize("kind", [batched, one_by_one])
def test_an_answer_is_cancelled_in_the_line_at_work_and_by_its_own_listener(kind: Any, model: Any) -> None:
    answerer: Answerer = kind(model, slots=2)
    own = Heard()

    def impatient(news: Any) -> None:
        own(news)
        if not isinstance(news, Ended):
            answerer.cancel(ticket)

    ticket = answerer.submit(question(), impatient)
    heard = [Heard() for _ in range(3)]
    tickets = [answerer.submit(question(6, 7), listener) for listener in heard]
    answerer.step()
    assert (answerer.working, answerer.waiting) == (1, 2)
    answerer.cancel(tickets[0])
    answerer.cancel(tickets[2])
    assert (answerer.working, answerer.waiting) == (0, 1)
    finish(answerer)
    answerer.cancel(tickets[1])
    ends = [own.ended, *(listener.ended for listener in heard)]
    assert [end and (end.reason, end.new_tokens) for end in ends] == [
        ("cancelled", 1),
        ("cancelled", 1),
        ("length", 8),
        ("cancelled", 0),
    ]


def test_answers_at_work_wait_for_a_bounded_number_of_prompt_tokens() -> None:
    line, heard = line_of(positions=2 * PROMPT_TOKENS), Heard()
    for length in (5, PROMPT_TOKENS - 5, 1, PROMPT_TOKENS + 1, 1):
        line.submit(Question([5] * length), heard)
    admitted = [[len(answer.question.prompt) for answer in line.admit(4)] for _ in range(4)]
    assert admitted == [[5, PROMPT_TOKENS - 5], [1], [PROMPT_TOKENS + 1], [1]]
    assert line.admit(4) == []


def test_questions_of_several_adapters_are_computed_by_theirs(model: Any) -> None:
    selected = list[str]()
    answerer = one_by_one(model, line=line_of("a", "b"))
    assert isinstance(answerer, OneByOne)
    answerer._select = selected.append
    for name in ("b", "", "a", "b"):
        answerer.submit(question(adapter=name), Heard())
    answerer.step()
    assert selected == ["", "a", "b"]


class Shifted(ByAnswer):
    """As if each adapter's answers were the base's, its number of tokens further: rows are computed by theirs."""

    def __init__(self, model: Any, chooser: Chooser, slots: int, *, mixes: bool) -> None:
        super().__init__(model, self._choose_shifted, slots)
        self._chooser, self._shifts, self.selected = chooser, torch.zeros(0, dtype=torch.int64), list[str]()
        self.numbers = {"": 0, "a": 1, "b": 2}
        self.adapter_rows = AdapterRows(
            self.numbers, slots, torch.device("cpu"), self.selected.append, self._set_rows if mixes else None
        )

    def _set_rows(self, numbers: torch.Tensor) -> None:
        self._shifts = numbers

    def _choose_shifted(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.adapter_rows(rows)
        only = self.adapter_rows.variant
        shifts = self._shifts.tolist() if only is None else [self.numbers[only]] * len(rows)
        rolled = [own.roll(shift) for own, shift in zip(logits, shifts, strict=True)]
        return self._chooser(torch.stack(rolled), rows)


@pytest.mark.parametrize("mixes", [True, False])
def test_rows_are_computed_by_their_adapters_in_one_pass_or_where_they_cannot_one_adapter_at_a_time(
    mixes: bool, model: Any
) -> None:
    line, chooser = line_of("a", "b"), Chooser(3, VOCAB, torch.device("cpu"))
    decoder = Shifted(model, chooser, 3, mixes=mixes)
    answerer = Batched(decoder, chooser, line, decoder.adapter_rows, slots=3)
    names = ("a", "", "b", "b", "a")
    asked = [question(max_new_tokens=2 + place, adapter=name) for place, name in enumerate(names)]
    found = [own.tokens for own in answered(answerer, *asked)]
    for name, own, tokens in zip(names, asked, found, strict=True):
        alone = OneByOne(
            model, ShiftedChooser(decoder.numbers[name]), line_of("a", "b"), slots=1, select=lambda _: None
        )
        assert tokens == answered(alone, own)[0].tokens
    assert decoder.selected == ([] if mixes else ["", "a", "", "b", "a"])


class ShiftedChooser(Chooser):
    def __init__(self, shift: int) -> None:
        super().__init__(1, VOCAB, torch.device("cpu"))
        self._shift = shift

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return super().__call__(logits.roll(self._shift, -1), rows)


def test_log_probabilities_come_as_many_as_were_asked_for(model: Any) -> None:
    with_two, with_none = answered(batched(model), question(logprobs=2, max_new_tokens=3), question(max_new_tokens=3))
    for piece in with_two.pieces:
        assert piece.likely[0].token == piece.token
        assert piece.likely[0].logprob == piece.logprob
        assert len(piece.likely) == 2
    assert all(piece.logprob is None and not piece.likely for piece in with_none.pieces)
