"""Reasoning, parts of content, and conversations that begin with an answer."""

from typing import Any

import pytest

from qdist.core.data.conversation import Conversation, Style, Turn
from qdist.core.data.reading import Reading
from qdist.core.data.records import UNASKED, conversations
from qdist.core.data.transcripts import is_spoken, turns_in
from qdist.core.errors import DataError


def read(record: dict[str, Any]) -> Conversation:
    (found,) = conversations(record, where="f.jsonl:3")
    return found


def talk(answer: dict[str, Any], user: object = "q") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant"} | answer]}


def part(kind: str, text: object, **beside: object) -> dict[str, object]:
    return {"type": kind, kind: text} | beside


THOUGHT = Turn("assistant", "a", True, thoughts="Hm.")


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "a", "reasoning_content": "Hm."}, {"content": "a", "reasoning": "Hm."},
        {"content": "a", "thinking": "Hm."}, {"content": "a", "reasoning": "Hm.", "reasoning_content": "Hm."},
        {"content": [part("thinking", "Hm."), part("text", "a")]},
        {"content": [part("thinking", [part("text", "H"), part("text", "m.")]), "a"]},
        {"content": [part("reasoning", "Hm."), part("text", "a")]},
        {"content": [{"type": "reasoning", "text": "Hm."}, {"type": "output_text", "text": "a"}]},
    ],
)  # fmt: skip
def test_reasoning_is_told_from_the_answer(answer: dict[str, Any]) -> None:
    found = read(talk(answer))
    assert (found.turns[1], found.unused) == (THOUGHT, ())


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "q", "output": "a", "reasoning_content": "Hm."},
        {"prompt": "q", "completion": "a", "thinking": "Hm."}, {"question": "q", "reasoning": "Hm.", "answer": "a"},
        {"conversation": [{"input": "q", "output": "a", "thinking": "Hm."}]},
    ],
)  # fmt: skip
def test_pairs_have_reasoning_too(record: dict[str, Any]) -> None:
    assert read(record).turns[1] == THOUGHT


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_answer_may_be_nothing_but_reasoning(content: dict[str, Any]) -> None:
    assert read(talk(content | {"thinking": "Hm."})).turns[1] == Turn("assistant", "", True, thoughts="Hm.")


@pytest.mark.parametrize("nothing", [None, "", " "])
def test_no_reasoning_is_none(nothing: str | None) -> None:
    assert read(talk({"content": "a", "reasoning_content": nothing})).turns[1] == Turn("assistant", "a", True)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (talk({"content": "<think>Hm.</think>a", "thinking": "So."}), "turn 2 has reasoning beside the content and in"),
        (
            talk({"content": [part("thinking", "Hm."), "a"], "reasoning": "So."}),
            "turn 2 has reasoning beside",
        ),
        (talk({"content": ["a", part("thinking", "Hm.")]}), "turn 2 holds reasoning behind text"),
        (talk({"content": "a", "reasoning_content": ["Hm."]}), "turn 2: 'reasoning_content' must be text, not a list"),
        (talk({"content": "a"}, [part("thinking", "Hm.")]), "turn 1 is the user's and holds reasoning"),
        (talk({"content": [{"type": "redacted_thinking", "data": "x"}]}), "a part of type 'redacted_thinking'"),
        (talk({"content": "a"}, [{"type": "image"}, {"type": "text", "text": "q"}]), "a part of type 'image'"),
        (talk({"content": "a"}, [part("input_audio", {})]), "a part of type 'input_audio'"),
        (talk({"content": "a"}, [part("video_url", {})]), "a part of type 'video_url'"),
        (talk({"content": None}), "turn 2: 'content' must be text, not null"),
        ({"messages": [{"role": "user", "content": "q", "thinking": "Hm."}]}, "is the user's and has 'thinking'"),
        ({"text": "a", "reasoning_content": "Hm."}, "has 'reasoning_content', of which nothing is made"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(record)
    assert said in caught.value.message


def test_keys_of_parts_that_nothing_is_made_of_are_named() -> None:
    record = talk({"content": [part("thinking", "Hm.", signature="x"), part("text", "a", image=None)]})
    assert read(record).unused == ("messages.content.signature",)


@pytest.mark.parametrize(
    ("style", "before"), [("headings", " "), ("alpaca", ""), ("plain", "")]
)  # fmt: skip
def test_reasoning_stands_before_the_answer_without_a_chat_template(style: Style, before: str) -> None:
    turns = (Turn("user", "q", False), THOUGHT)
    segments = Conversation(turns=turns, where="", style=style).segments()
    assert segments[1].text == f"{before}<think>\nHm.\n</think>\n\na"
    assert segments[1].learn


def test_a_conversation_that_was_cut_begins_with_what_asks() -> None:
    turns = [{"from": "gpt", "value": "and so."}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    found = read({"conversations": turns})
    assert found.turns == (Turn("user", "q", False), Turn("assistant", "a", True))
    assert found.notes == (UNASKED,)
    assert read({"conversations": turns[1:]}).notes == ()


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("<human>: q\n<bot>: a", (("user", "q", False), ("assistant", "a", True))),
        ("Some text.\n<human>: q\n<bot>:",
         (("system", "Some text.", False), ("user", "q", False), ("assistant", "", False))),
        ("\n\nHuman: q\n\nr\n\nAssistant: a\nHuman: not one",
         (("user", "q\n\nr", False), ("assistant", "a\nHuman: not one", True))),
        ("Human: q\n\nAssistant: a", (("user", "q", False), ("assistant", "a", True))),
        ("<human>: a Human: b\n\nAssistant: c\n<bot>: d",
         (("user", "a Human: b\n\nAssistant: c", False), ("assistant", "d", True))),
        ("no speakers", ()),
    ],
)  # fmt: skip
def test_transcripts_are_cut_at_their_marks(text: str, turns: tuple[tuple[str, str, bool], ...]) -> None:
    assert tuple((turn.role, turn.text, turn.learn) for turn in turns_in(text)) == turns


def test_text_is_a_transcript_where_it_begins_as_one() -> None:
    assert is_spoken("\n\nHuman: a\n\nAssistant:")
    assert not is_spoken("He said Human: a\n\nAssistant: b")
    assert read({"text": "Human: q\n\nAssistant: a"}).format == "text"
    with pytest.raises(DataError, match="'text' has no turn marked by '<bot>:' or 'Assistant:'"):
        conversations({"text": "words"}, where="f.jsonl:3", reading=Reading(format="transcript"))
