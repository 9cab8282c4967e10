"""The demo data is fixed by its seed, and its questions are not in it."""

import re

import pytest

from qdist.core.data.demo import SYSTEM, questions, records
from qdist.core.data.records import Conversation, conversations
from qdist.core.errors import DataError


def parsed(seed: int = 0, count: int = 640) -> list[Conversation]:
    found = (conversations(record, where="demo") for record in records(seed, count))
    return [conversation for (conversation,) in found]


def test_the_same_seed_gives_the_same_records() -> None:
    assert records(3, 50) == records(3, 50) == records(3, 60)[:50]
    assert records(3, 50) != records(4, 50)


def test_records_are_short_distinct_dialogues_under_one_system_prompt() -> None:
    dialogues = parsed()
    assert {tuple(turn.role for turn in dialogue.turns) for dialogue in dialogues} == {("system", "user", "assistant")}
    assert {dialogue.turns[0].text for dialogue in dialogues} == {SYSTEM}
    assert len({dialogue.turns[1].text for dialogue in dialogues}) == 640
    assert max(len(turn.text) for dialogue in dialogues for turn in dialogue.turns) <= 60


def test_every_answer_is_in_the_notation() -> None:
    notation = re.compile(r"TABLE [A-Z][a-z]+ x\d @\d+h|TAXI [a-z]+ @\d+h|FOOD [A-Z][a-z]+ x\d [a-z]+")
    answers = [dialogue.turns[2].text for dialogue in parsed()] + [question.answer for question in questions()]
    assert [answer for answer in answers if not notation.fullmatch(answer)] == []


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_question_is_ever_trained_on(seed: int) -> None:
    orders = {dialogue.turns[1].text for dialogue in parsed(seed, 4000)}
    answers = {dialogue.turns[2].text for dialogue in parsed(seed, 4000)}
    assert len(questions()) == 3
    assert not orders & {question.order for question in questions()}
    assert not answers & {question.answer for question in questions()}


def test_every_word_of_an_answer_is_seen_in_training() -> None:
    seen = {word for dialogue in parsed() for word in dialogue.turns[2].text.split()}
    assert {word for question in questions() for word in question.answer.split()} <= seen


def test_a_question_is_asked_as_the_records_are() -> None:
    assert [message["role"] for message in questions()[0].messages()] == ["system", "user"]
    assert questions()[0].messages()[0]["content"] == SYSTEM


def test_more_records_than_there_are_orders_are_refused() -> None:
    with pytest.raises(DataError, match="at most 4,000 records, not 4,001"):
        records(count=4001)
