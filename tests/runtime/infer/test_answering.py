"""Prompts are all in the answerer's line at once, each with its settings; what comes is counted and kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from qdist.core.composed import sampled_request_of
from qdist.core.data.conversation import Conversation, Turn, Wording
from qdist.core.errors import JobError, SpecError
from qdist.core.requests import Generate
from qdist.core.sampling import Sampling
from qdist.runtime.infer import answering
from qdist.runtime.infer.answerer import Ended
from qdist.runtime.infer.answering import Asked, Work, answer_with
from qdist.runtime.infer.generate import _line
from qdist.runtime.infer.kept import Answered
from qdist.runtime.infer.prompts import Speech
from tests.runtime.data.test_tokenized import CHATML, tiny_tokenizer
from tests.runtime.infer.scripted import Scripted
from tests.runtime.infer.test_generate import answered
from tests.runtime.tiny import save_model

FILES = {"run": "run", "prompts": "p", "out": "o"}
SPEECH = Speech(None, Wording(style="chat"), 128)


def test_answers_are_kept_one_by_one_with_their_counts_and_why_they_ended() -> None:
    answerer = Scripted(lambda question: [" a", " b", "c "][: len(question.prompt)], slots=2)
    asked = [Asked(number, [1] * length, Sampling(max_new_tokens=3)) for number, length in ((7, 3), (2, 2), (5, 1))]
    kept: list[dict[int, Answered]] = []
    seconds = iter(range(10))
    work = Work(Generate(**FILES), SPEECH, asked, 9)
    answer_with(answerer, "adapter", work, kept.append, clock=lambda: next(seconds))
    assert [list(answers) for answers in kept] == [[7], [2], [5]]
    assert kept[0][7] == Answered(text="a bc", prompt_tokens=3, new_tokens=3, finish="length", after_s=1)
    assert kept[1][2] == Answered(text="a b", prompt_tokens=2, new_tokens=2, finish="stop", after_s=2)
    assert answerer.most_working == 2
    assert {question.adapter for question in answerer.questions} == {"adapter"}


def test_the_error_that_ends_an_answer_is_raised_and_others_before_it_are_kept() -> None:
    error, kept = JobError("logits are NaN at token 2"), list[dict[int, Answered]]()

    class Failing(Scripted):
        def cancel(self, ticket: int) -> None:
            question, listener, _ = self._line.pop(ticket)
            listener(Ended("error", "", len(question.prompt), 1, error))

        def step(self) -> bool:
            if 2 in self._line and self._said[2]:
                self.cancel(2)
            return super().step()

    asked = [Asked(number, [1], Sampling(max_new_tokens=number + 1)) for number in (0, 3)]
    with pytest.raises(JobError, match="NaN at token 2"):
        answer_with(Failing(lambda _: "abcd"), "adapter", Work(Generate(**FILES), SPEECH, asked, 9), kept.append)
    assert [list(answers) for answers in kept] == [[0]]


def test_a_line_has_the_answer_or_lists_of_several() -> None:
    own = Conversation(turns=(Turn("user", "hi", False),), where="p:1")
    one = Answered(text="a", prompt_tokens=3, new_tokens=1, finish="stop", after_s=0)
    two = Answered(text="ü", prompt_tokens=3, new_tokens=9, finish="length", after_s=0)
    messages = [{"role": "user", "content": "hi"}]
    assert json.loads(_line(own, [one], {})) == {
        "messages": messages, "answer": "a", "prompt_tokens": 3, "new_tokens": 1, "finish": "stop",
    }  # fmt: skip
    assert json.loads(_line(own, [one, two], {})) == {
        "messages": messages, "answers": ["a", "ü"], "prompt_tokens": 3, "new_tokens": [1, 9],
        "finish": ["stop", "length"],
    }  # fmt: skip


def test_each_answer_of_a_prompt_has_the_next_seed() -> None:
    request = sampled_request_of(Generate, FILES | {"temperature": "1", "n": "3", "seed": str(2**63 - 2)})
    assert [request.sampling.again(draw).seed for draw in range(3)] == [2**63 - 2, 2**63 - 1, -(2**63)]


def test_stop_texts_are_typed_on_one_line() -> None:
    assert sampled_request_of(Generate, FILES | {"stop": (r"\n\n", "a\tb")}).sampling.stop == ("\n\n", "a\tb")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_p": "0.9"}, "--top-p would change nothing: at temperature 0"),
        ({"min_p": "0.1", "top_k": "4", "seed": "1", "temperature": "0"}, "--top-k, --min-p, --seed would change"),
        ({"n": "2"}, "--n 2: without a temperature all 2 answers"),
        ({"beams": "2", "temperature": "1"}, "--beams 2 looks for the likeliest answer"),
        ({"beams": "2", "n": "3"}, "--beams 2 looks for the one likeliest answer, and --n 3 asks for 3"),
        ({"stop": ("a", "")}, "--stop '' has no text to stop at"),
        ({"beams": "2", "engine": "llama.cpp"}, "--beams are transformers'"),
        ({"adapter": "other"}, "adapter cannot be 'other': it is"),
        ({"temperature": "nan"}, "temperature cannot be 'nan'"),
        ({"stop": ("x",) * 17}, "--stop: expected `array` of length <= 16"),
        ({"seed": str(2**63)}, "seed cannot be"),
    ],
)
def test_flags_that_would_do_nothing_or_contradict_each_other_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        sampled_request_of(Generate, FILES | given)
    assert caught.value.message.startswith(message)
    assert caught.value.try_


def test_beams_find_an_answer_at_least_as_likely_and_stop_at_texts(tmp_path: Path, monkeypatch: Any) -> None:
    model = save_model(tmp_path / "model", tokenizer=tiny_tokenizer(CHATML, bos=False))
    (tmp_path / "p.txt").write_text("hello\nhello there system\n")
    seen: list[dict[str, Any]] = []
    real = answering.complete

    def seeing(*given: Any, **options: Any) -> Any:
        seen.append(options)
        return real(*given, **options)

    monkeypatch.setattr(answering, "complete", seeing)
    answered(model, tmp_path / "p.txt", tmp_path / "o.jsonl", beams=3, max_new_tokens=5, stop=("zzz",))
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line["finish"] for line in lines] == ["length" if line["new_tokens"] == 5 else "stop" for line in lines]
    assert [(own["num_beams"], own["stop"]) for own in seen] == [(3, ("zzz",))]
