"""Questions of MMLU, in the two formats that there are."""

from typing import Any

import pytest

from qdist.core.errors import DataError
from qdist.core.evaluation.multiple_choice import Exam, Question, exam_of, prompt_of, question_of

HEAD = "The following are multiple choice questions (with answers) about  high school art."
BODY = "Which?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
HUB = {"question": " Which? ", "choices": ["one", "two", "three", "four"], "subject": "high_school_art"}


@pytest.mark.parametrize(
    ("record", "question"),
    [
        (
            {"subject": "high_school_art", "input": f"{HEAD}\n\n{BODY}", "output": "C"},
            Question("high_school_art", HEAD, BODY, 2),
        ),
        ({"input": BODY, "output": " B\n", "subject": "x"}, Question("x", "", BODY, 1)),
        (
            {**HUB, "answer": 3, "split": "dev"},
            Question("high_school_art", HEAD.replace("about  ", "about "), BODY, 3, "dev"),
        ),
        ({**HUB, "answer": "A"}, Question("high_school_art", HEAD.replace("about  ", "about "), BODY, 0)),
    ],
)
def test_a_record_is_a_question(record: Any, question: Question) -> None:
    assert question_of(record, "f:1") == question


@pytest.mark.parametrize(
    "record",
    [[], {"subject": "x"}, {**HUB, "answer": 4}, {**HUB, "answer": None}, {**HUB, "choices": ["a"], "answer": 0}],
)
def test_another_record_is_refused_by_its_place(record: Any) -> None:
    with pytest.raises(DataError, match="f:7"):
        question_of(record, "f:7")


def test_examples_stand_before_the_question_with_their_answers() -> None:
    question, example = Question("s", "head", "q Answer:", 0), Question("s", "head", "e Answer:", 3)
    assert prompt_of(question) == "head\n\nq Answer:"
    assert prompt_of(question, [example]) == "head\n\ne Answer: D\n\nq Answer:"


def _questions(subject: str, count: int, split: str = "") -> list[Question]:
    return [Question(subject, "", f"{subject}{number}", 0, split) for number in range(count)]


def test_without_examples_of_their_own_the_first_of_each_subject_are_and_are_not_asked() -> None:
    found = [*_questions("a", 4), *_questions("b", 3)]
    exam = exam_of(found, shots=2)
    assert [question.body for question in exam.questions] == ["a2", "a3", "b2"]
    assert [example.body for example in exam.examples["b"]] == ["b0", "b1"]


def test_examples_come_from_the_dev_split_or_file() -> None:
    found, dev = _questions("a", 2), _questions("a", 9, "dev")
    for exam in (exam_of([*dev, *found], shots=5), exam_of(found, dev, shots=5)):
        assert [question.body for question in exam.questions] == ["a0", "a1"]
        assert exam.examples["a"] == dev[:5]


def test_without_shots_nothing_of_the_dev_split_is_asked_or_shown() -> None:
    found = [*_questions("a", 2), *_questions("a", 1, "dev")]
    assert exam_of(found, shots=0) == Exam(found[:2], {})
