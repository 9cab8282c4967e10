"""Raw records become the conversations they describe, or an error that says where and why."""

import pytest

from qdist.core.data.conversation import Conversation, Turn
from qdist.core.data.reading import Reading
from qdist.core.data.records import FORMATS, conversations, detect
from qdist.core.errors import DataError

ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nAdd.\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
)


def exchange(user: str, assistant: str) -> tuple[Turn, ...]:
    return (Turn("user", user, False), Turn("assistant", assistant, True))


def only(record: dict[str, object], data_format: str | None = None) -> Conversation:
    (conversation,) = conversations(record, where="f.jsonl:3", reading=Reading(format=data_format))
    return conversation


def paired(instruction: str, extra: str, answer: str) -> tuple[Turn, ...]:
    return (Turn("user", instruction, False, extra), Turn("assistant", answer, True))


TRANSCRIPT = "### Human: a ### Assistant:"


@pytest.mark.parametrize(
    ("record", "turns", "pieces", "verbatim"),
    [
        ({"instruction": "Add.", "output": "3"}, exchange("Add.", "3"), (ALPACA_PLAIN, "3"), False),
        ({"instruction": "Add.", "input": "", "output": "3"}, exchange("Add.", "3"), (ALPACA_PLAIN, "3"), False),
        ({"instruction": "Add.", "input": None, "output": "3"}, exchange("Add.", "3"), (ALPACA_PLAIN, "3"), False),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            paired("Add.", "1 2", "3"),
            (ALPACA_WITH_INPUT, "3"),
            False,
        ),
        (
            {"instruction": "Add.", "context": "1 2", "response": "3"},
            paired("Add.", "1 2", "3"),
            (ALPACA_WITH_INPUT, "3"),
            False,
        ),
        ({"input": "a", "output": "b", "id": 1}, exchange("a", "b"), ("a", "b"), False),
        ({"prompt": "a", "completion": "b"}, exchange("a", "b"), ("a", "b"), False),
        ({"question": "a", "answer": "b"}, exchange("a", "b"), ("a", "b"), False),
        ({"input": TRANSCRIPT, "output": "b", "text": "c"}, exchange(TRANSCRIPT, "b"), (TRANSCRIPT, "b"), True),
        ({"text": "a"}, (Turn("assistant", "a", True),), ("a",), True),
    ],
)
def test_a_pair_keeps_its_texts_and_learns_the_answer(
    record: dict[str, object], turns: tuple[Turn, ...], pieces: tuple[str, ...], verbatim: bool
) -> None:
    found = only(record)
    assert (found.turns, found.where, found.verbatim) == (turns, "f.jsonl:3", verbatim)
    assert tuple(segment.text for segment in found.segments()) == pieces
    assert [segment.learn for segment in found.segments()] == [turn.learn for turn in turns]


@pytest.mark.parametrize(
    "record",
    [
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "u"},
                {"from": "gpt", "value": "a"},
            ]
        },
        {"messages": [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]},
    ],
)
def test_a_dialogue_learns_the_assistant_only(record: dict[str, object]) -> None:
    assert only(record).turns == (Turn("system", "s", False), Turn("user", "u", False), Turn("assistant", "a", True))


def test_self_instruct_gives_one_conversation_an_instance() -> None:
    record: dict[str, object] = {
        "instruction": "Add.",
        "instances": [{"input": "", "output": "0"}, {"input": "1 2", "output": "3"}],
    }
    first, second = conversations(record, where="f.jsonl:3")
    assert first.turns == exchange("Add.", "0")
    assert second.turns == paired("Add.", "1 2", "3")
    assert second.segments()[0].text == ALPACA_WITH_INPUT
    assert second.where == "f.jsonl:3, instance 2"


def test_a_format_can_be_forced() -> None:
    assert only({"input": "a", "output": "b", "text": "c"}, "text").turns == (Turn("assistant", "c", True),)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_is_not_learned_and_the_reason_is_kept(answer: str) -> None:
    found = only({"instruction": "Say nothing.", "output": answer})
    assert not found.learns
    assert found.why_nothing == "the answer is empty"


def test_every_format_has_a_record_that_shows_it() -> None:
    shown: dict[str, dict[str, object]] = {
        "alpaca": {"instruction": ""},
        "input-output": {"input": "", "output": ""},
        "oasst": {"input": "### Human: ### Assistant:", "output": ""},
        "sharegpt": {"conversations": []},
        "messages": {"messages": []},
        "self-instruct": {"instruction": "", "instances": []},
        "preference": {"chosen": ""},
        "transcript": {"text": "<human>: a\n<bot>: b"},
        "text": {"text": ""},
    }
    assert {name: detect(record, where="") for name, record in shown.items()} == {name: name for name in FORMATS}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"instruction": "a", "inputs": "b"}, "f.jsonl:3: 'output' is missing; keys found: instruction, inputs"),
        ({"instruction": "a", "output": None}, "f.jsonl:3: 'output' must be text, not null"),
        ({"input": "a", "answer": "b"}, "f.jsonl:3: keys input, answer fit no known record format"),
        ({}, "f.jsonl:3: keys none fit no known record format"),
        ({"text": 5}, "f.jsonl:3: 'text' must be text, not a number"),
        ({"messages": []}, "f.jsonl:3: 'messages' must be a list with at least one object, not an empty list"),
        ({"messages": ["a"]}, "f.jsonl:3: 'messages' item 1 must be an object, not text"),
        ({"messages": [{"role": "user"}]}, "f.jsonl:3, turn 1: 'content' is missing; keys found: role"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "f.jsonl:3: the first turn is the tool's, so nothing asks for it",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "f.jsonl:3: 1 turns, none of them the assistant's"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "f.jsonl:3: the first turn is the assistant's"),
        ({"instruction": "a", "instances": [{"input": "b"}]}, "f.jsonl:3, instance 1: 'output' is missing"),
    ],
)
def test_a_bad_record_is_refused_with_its_place_and_the_keys_found(record: dict[str, object], said: str) -> None:
    with pytest.raises(DataError) as caught:
        conversations(record, where="f.jsonl:3")
    assert said in caught.value.message


def test_a_prompt_of_turns_needs_a_completion() -> None:
    with pytest.raises(DataError, match="'output' is missing; keys found: input"):
        only({"input": [{"role": "user", "content": "a"}]}, "input-output")


def test_a_mistyped_format_names_the_nearest() -> None:
    with pytest.raises(DataError) as caught:
        only({"text": "a"}, "share-gpt")
    assert caught.value.try_ == "sharegpt"


def test_without_a_chat_template_turns_stand_under_headings() -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    dialogue = only({"messages": [{"role": role, "content": f"{role}!"} for role in roles]})
    pieces = [(segment.text, segment.learn) for segment in dialogue.segments()]
    assert pieces == [
        ("system!\n", False),
        ("\n### Human: user!\n### Assistant:", False),
        (" assistant!", True),
        ("\n### Human: user!\n### Assistant:", False),
        (" assistant!", True),
    ]
