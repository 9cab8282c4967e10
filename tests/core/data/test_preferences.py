"""Preference records train on the chosen answer, and say so."""

from typing import Any

import pytest

from qdist.core.data.conversation import Conversation, Turn
from qdist.core.data.preferences import CHOSEN
from qdist.core.data.reading import Reading
from qdist.core.data.records import conversations, detect
from qdist.core.errors import DataError

USER = {"role": "user", "content": "q"}
BAD = {"role": "assistant", "content": "bad"}
GOOD = {"role": "assistant", "content": "good"}
ANSWERED = (Turn("user", "q", False), Turn("assistant", "good", True))


def read(record: dict[str, Any], data_format: str | None = None) -> Conversation:
    (found,) = conversations(record, where="f.jsonl:3", reading=Reading(format=data_format))
    return found


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"question": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"conversations": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "good", "rejected": "bad"},
    ],
)
def test_the_chosen_answer_is_learned(record: dict[str, Any]) -> None:
    found = read(record)
    assert (found.turns, found.format, found.notes, found.unused) == (ANSWERED, "preference", (CHOSEN,), ())


def test_an_instruction_keeps_its_input_and_its_system_message() -> None:
    found = read({"instruction": "q", "input": "i", "system": "s", "chosen": "good", "rejected": "bad"})
    assert found.turns == (Turn("system", "s", False), Turn("user", "q", False, "i"), Turn("assistant", "good", True))
    assert found.style == "alpaca"


def test_of_a_prompt_nothing_is_learned_even_if_the_chosen_turns_repeat_it() -> None:
    prompt = [USER, BAD, {"role": "user", "content": "r"}]
    for chosen in ([GOOD], [*prompt, GOOD]):
        found = read({"prompt": prompt, "chosen": chosen, "rejected": [BAD]})
        assert [turn.learn for turn in found.turns] == [False, False, False, True]
    alone = read({"chosen": [*prompt, GOOD], "rejected": [*prompt, BAD]})
    assert [turn.learn for turn in alone.turns] == [False, True, False, True]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"chosen": "good", "rejected": "bad"}, "'chosen' is not an answer to anything; keys found: chosen, rejected"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "'chosen' is not an answer to anything"),
        ({"prompt": "q", "chosen": [USER]}, "'chosen' is not an answer to anything"),
        ({"prompt": "q", "chosen": 7}, "'chosen' must be text, not a number"),
        ({"prompt": "q", "chosen": []}, "'chosen' must be a list with at least one object"),
        ({"messages": [USER], "chosen": {"role": "narrator", "content": "a"}}, "'chosen': 'role' is 'narrator'"),
        ({"prompt": "q", "chosen": "a", "images": ["x"]}, "has 'images', of which nothing is made"),
    ],
)
def test_what_cannot_be_preferred_is_refused(record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(record)
    assert said in caught.value.message


def test_whole_conversations_win_over_the_preferences_beside_them() -> None:
    record = {"messages": [USER, GOOD], "prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert detect(record, where="") == "messages"
    assert read(record).unused == ("prompt", "chosen", "rejected")
    assert read(record, "preference").turns == ANSWERED


@pytest.mark.parametrize("label", ["label", "kto_tag"])
def test_an_answer_that_is_labelled_as_bad_is_not_learned_and_told_apart_from_an_empty_one(label: str) -> None:
    pair = {"prompt": "q", "completion": "good"}
    assert read(pair | {label: True}).turns == ANSWERED
    bad = read(pair | {label: False})
    assert (bad.learns, bad.format, bad.why_nothing) == (False, "preference", "the answer is labelled as a bad one")
    assert read(pair | {"completion": " ", label: True}).why_nothing == "the answer is empty"


@pytest.mark.parametrize(
    "record", [{"messages": [USER, GOOD]}, {"instruction": "q", "output": "good"}, {"question": "q", "answer": "good"}]
)
def test_records_of_any_format_may_be_labelled(record: dict[str, Any]) -> None:
    assert read(record | {"kto_tag": True}).turns == ANSWERED
    assert not read(record | {"kto_tag": False}).learns


def test_a_label_that_is_a_class_is_no_verdict() -> None:
    found = read({"prompt": "q", "completion": "good", "label": 0})
    assert (found.format, found.learns, found.unused) == ("input-output", True, ("label",))
    assert read({"question": "q", "answer": "good", "label": False}).format == "input-output"
    with pytest.raises(DataError, match="'chosen' is missing; keys found: prompt, completion, label"):
        read({"prompt": "q", "completion": "good", "label": 0}, "preference")
