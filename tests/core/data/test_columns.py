"""Columns, keys of turns and roles that the data calls otherwise are read under our names."""

from typing import Any

import pytest

from qdist.core.data.conversation import Turn
from qdist.core.data.reading import Reading, reading_of
from qdist.core.data.records import asked, conversations
from qdist.core.errors import DataError, SpecError
from qdist.core.spec.sections import Data

ANSWERED = (Turn("user", "q", False), Turn("assistant", "a", True))


@pytest.mark.parametrize(
    ("record", "columns", "data_format"),
    [
        ({"ask": "q", "reply": "a"}, {"instruction": "ask", "output": "reply"}, "alpaca"),
        ({"ask": "q", "output": "a"}, {"instruction": "ask"}, "alpaca"),
        ({"meta": {"ask": "q", "reply": "a"}}, {"input": "meta.ask", "output": "meta.reply"}, "input-output"),
        ({"a": {"b": {"c": "q"}}, "answer": "a"}, {"question": "a.b.c"}, "input-output"),
        ({"x.y": "q", "output": "a"}, {"input": "x.y"}, "input-output"),
        ({"input": "a", "output": "q"}, {"input": "output", "output": "input"}, "input-output"),
        ({"log": [{"by": "user", "is": "q"}, {"by": "bot", "is": "a"}]},
         {"messages": "log", "messages.role": "by", "messages.content": "is"}, "messages"),
        ({"ask": "q", "good": "a", "instruction": None}, {"prompt": "ask", "chosen": "good"}, "preference"),
    ],
)  # fmt: skip
def test_columns_are_read_under_our_names(record: dict[str, Any], columns: dict[str, str], data_format: str) -> None:
    (found,) = conversations(record, where="f.jsonl:3", reading=Reading(columns=columns))
    assert (found.turns, found.format, found.unused) == (ANSWERED, data_format, ())


def test_what_is_named_says_what_the_record_is() -> None:
    record = {"body": "words", "question": "q", "answer": "a"}
    (found,) = conversations(record, where="", reading=Reading(columns={"text": "body"}))
    assert (found.format, found.unused) == ("text", ("question", "answer"))


def test_what_our_names_stood_for_before_is_not_dropped_in_silence() -> None:
    record = {"instruction": "old", "ask": "q", "output": "a", "meta": {"x": 1, "y": 2}}
    (found,) = conversations(record, where="", reading=Reading(columns={"instruction": "ask"}))
    assert (found.turns, found.unused) == (ANSWERED, ("instruction (its own)", "meta"))
    turns = [{"by": "user", "role": "narrator", "content": "q"}, {"role": "assistant", "content": "a"}]
    (found,) = conversations({"messages": turns}, where="", reading=Reading(columns={"messages.role": "by"}))
    assert (found.turns, found.unused) == (ANSWERED, ("messages.role (its own)",))


@pytest.mark.parametrize(
    ("columns", "said", "hint"),
    [
        ({"instruction": "questoin"}, "there is no 'questoin' to read as 'instruction'; keys found: question, meta",
         "data.columns with instruction=question"),
        ({"output": "meta.reply"}, "f.jsonl:3, meta: there is no 'reply' to read as 'output'; keys found: ask",
         "names"),
        ({"output": "question.text"}, "there is no 'question.text'", "output=question"),
        ({"messages.role": "by"}, "'messages' has no turn with 'by' to read as 'role'", "a key that the turns have"),
    ],
)  # fmt: skip
def test_a_column_that_is_missing_is_named_with_those_that_there_are(
    columns: dict[str, str], said: str, hint: str
) -> None:
    with pytest.raises(DataError) as caught:
        conversations({"question": "q", "meta": {"ask": 1}}, where="f.jsonl:3", reading=Reading(columns=columns))
    assert said in caught.value.message
    assert hint in caught.value.try_


TALK = {"messages": [{"role": "Customer ", "content": "q"}, {"role": "AGENT", "content": "a"}]}
ROLES = {"user": "customer", "assistant": "Agent"}


def test_roles_are_read_under_our_names_in_any_case() -> None:
    assert conversations(TALK, where="", reading=Reading(roles=ROLES))[0].turns == ANSWERED


def test_our_names_of_roles_stay_and_theirs_win() -> None:
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "human", "content": "a"}]}
    assert conversations(record, where="", reading=Reading(roles={"assistant": "human"}))[0].turns == ANSWERED


def test_a_role_of_calls_has_another_name_too() -> None:
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "act", "content": '{"name": "feed"}'}]}
    (found,) = conversations(record, where="", reading=Reading(roles={"function_call": "act"}))
    assert found.turns[1].calls[0]["function"]["name"] == "feed"


def test_an_unknown_role_names_the_setting() -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:3, turn 1: 'role' is 'Customer '") as caught:
        conversations(TALK, where="f.jsonl:3")
    assert "--set data.roles=user=Customer" in caught.value.try_


def test_a_role_that_is_not_ours_is_refused_before_any_record_is_read() -> None:
    with pytest.raises(SpecError, match="names 'usr', which is none of system, user, assistant, tool") as caught:
        reading_of(Data(roles=("usr=Customer",)), "auto")
    assert caught.value.try_ == "--set data.roles=user=Customer"


@pytest.mark.parametrize(
    "record", [{"question": "q"}, {"instruction": "q"}, {"prompt": "q"}, {"log": [{"who": "user", "content": "q"}]}]
)
def test_a_prompt_may_lack_columns_and_have_our_names(record: dict[str, Any]) -> None:
    columns = {"instruction": "question", "output": "reply", "messages.role": "who", "messages": "log"}
    assert asked(record, where="p.jsonl:1", reading=Reading(columns=columns)).turns == (Turn("user", "q", False),)


def test_prompts_are_read_under_other_names_too() -> None:
    reading = Reading(columns={"messages": "log"}, roles={"user": "Customer"})
    found = asked({"log": [{"role": "Customer", "content": "q"}]}, where="p.jsonl:1", reading=reading)
    assert found.turns == ANSWERED[:1]
