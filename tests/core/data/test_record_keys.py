"""Every key of a record is used, refused or named: nothing that it says is dropped in silence."""

from typing import Any

import pytest

from qdist.core.data.conversation import Turn
from qdist.core.data.records import asked, conversations, require_whole_characters
from qdist.core.errors import DataError


def turns(record: dict[str, Any]) -> tuple[Turn, ...]:
    (found,) = conversations(record, where="f.jsonl:3")
    return found.turns


def said(record: dict[str, Any]) -> list[tuple[str, str, bool]]:
    return [(turn.role, turn.said, turn.learn) for turn in turns(record)]


TALK = [("user", "q"), ("assistant", "WRONG"), ("user", "again"), ("assistant", "right")]


def messages(*marks: dict[str, Any]) -> dict[str, Any]:
    """TALK, with marks on its turns."""
    padded = [*marks, *[{}] * (4 - len(marks))]
    return {
        "messages": [{"role": role, "content": text} | mark for (role, text), mark in zip(TALK, padded, strict=True)]
    }


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
@pytest.mark.parametrize("other", [{}, {"weight": 1}, {"train": True}, {"loss": None}, {"weight": None}])
def test_a_turn_that_is_marked_is_context_and_the_others_are_learned(
    mark: dict[str, Any], other: dict[str, Any]
) -> None:
    assert [turn.learn for turn in turns(messages({}, mark, {}, other))] == [False, False, False, True]
    shared = {
        "conversations": [
            {"from": "human", "value": "q"}, {"from": "gpt", "value": "WRONG"} | mark,
            {"from": "human", "value": "again"}, {"from": "gpt", "value": "right"} | other,
        ]
    }  # fmt: skip
    assert [turn.learn for turn in turns(shared)] == [False, False, False, True]


@pytest.mark.parametrize("mark", [{"weight": 0.5}, {"weight": -1}, {"train": "yes"}, {"loss": [True]}, {"weight": 2}])
def test_a_mark_that_is_neither_yes_nor_no_is_refused_with_its_place(mark: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:3, turn 2: '\w+' is .*learned or not"):
        turns(messages({}, mark))


def test_marks_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(DataError, match="'weight' and 'train' contradict each other"):
        turns(messages({}, {"weight": 1, "train": False}))


@pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}, {"loss": True}])
def test_a_users_turn_that_is_to_be_learned_is_refused(mark: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="turn 1 is the user's and is marked to be learned") as caught:
        turns(messages(mark))
    assert "train.train_on_source=true" in caught.value.try_


def test_a_users_turn_that_is_not_to_be_learned_is_what_it_is_anyway() -> None:
    assert [turn.learn for turn in turns(messages({"weight": 0}))] == [False, True, False, True]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_a_mark_of_a_whole_record_counts_for_all_of_its_answers(mark: dict[str, Any]) -> None:
    for record in (messages(), {"instruction": "a", "output": "b"}, {"input": "a", "output": "b"}, {"text": "a"}):
        (found,) = conversations({**record, **mark}, where="f.jsonl:3")
        assert not found.learns
        assert found.why_nothing == "no turn is marked to be learned"


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_message_beside_the_conversation_comes_first(key: str) -> None:
    brief = {key: "Be brief."}
    first = ("system", "Be brief.", False)
    assert said(messages() | brief)[0] == first
    assert said({"instruction": "a", "output": "b"} | brief) == [first, ("user", "a", False), ("assistant", "b", True)]
    assert said({"prompt": "a", "completion": "b"} | brief)[0] == first
    assert len(said(messages() | {key: " "})) == 4


def test_two_system_messages_are_refused_where_they_differ() -> None:
    record = messages()
    record["messages"].insert(0, {"role": "system", "content": "Be brief."})
    assert len(said(record | {"system": "Be brief."})) == 5
    with pytest.raises(DataError, match=r"'system' says \"Be long\.\", and a turn of the system's \"Be brief\.\""):
        turns(record | {"system": "Be long."})


def test_earlier_exchanges_come_before_the_last_and_are_learned_as_it_is() -> None:
    record = {"instruction": "q", "input": "", "output": "a", "history": [["Hello", "Welcome."], ["", "  "]]}
    assert said(record) == [
        ("user", "Hello", False), ("assistant", "Welcome.", True), ("user", "", False), ("assistant", "  ", False),
        ("user", "q", False), ("assistant", "a", True),
    ]  # fmt: skip
    with pytest.raises(DataError, match="'history' must be a list of pairs"):
        turns(record | {"history": ["Hello"]})


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("value", [[], "[]", "", None, {}])
def test_no_tools_are_none(key: str, value: object) -> None:
    (found,) = conversations(messages() | {key: value}, where="f.jsonl:3")
    assert (len(found.turns), found.tools, found.unused) == (4, (), ())


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
@pytest.mark.parametrize("value", [[], "[]", "", None, {}])
def test_no_calls_are_none(key: str, value: object) -> None:
    assert not any(turn.calls for turn in turns(messages({}, {key: value})))
    assert len(turns(messages() | {key: value})) == 4


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (messages() | {"tool_calls": [{"name": "feed"}]}, "f.jsonl:3 has 'tool_calls', of which nothing is made"),
        (messages({"tools": [{"name": "feed"}]}), "turn 1 has 'tools', of which nothing is made"),
        (messages({"tool_calls": [{"name": "feed"}]}), "turn 1 is the user's and has 'tool_calls'"),
        ({"text": "a", "tools": [{"name": "feed"}]}, "f.jsonl:3 has 'tools', of which nothing is made"),
    ],
)
def test_tools_and_calls_in_the_wrong_place_are_refused(record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        conversations(record, where="f.jsonl:3")
    assert said in caught.value.message


@pytest.mark.parametrize("key", ["images", "image", "videos", "audios", "history"])
def test_what_changes_a_record_and_is_not_read_is_refused(key: str) -> None:
    with pytest.raises(DataError, match=f"f.jsonl:3 has '{key}', of which nothing is made"):
        turns(messages() | {key: ["x"]})
    assert len(turns(messages() | {key: []})) == 4


@pytest.mark.parametrize("text", ["[]", "{}", "null"])
def test_text_is_never_taken_for_nothing(text: str) -> None:
    record = {"instruction": "Is it empty?", "input": text, "output": text, "system": text}
    assert said(record) == [
        ("system", text, False),
        ("user", f"Is it empty?\n\n{text}", False),
        ("assistant", text, True),
    ]


def test_of_two_keys_for_one_thing_none_is_dropped() -> None:
    both = {"instruction": "q", "input": "one", "context": "two", "output": "a"}
    (found,) = conversations(both, where="f.jsonl:3")
    assert (found.turns[0].said, found.unused) == ("q\n\none", ("context",))
    brief = messages() | {"system": "Be brief.", "system_prompt": "Be brief."}
    assert len(said(brief)) == 5
    with pytest.raises(DataError, match="has 'system_prompt', of which nothing is made"):
        turns(brief | {"system_prompt": "Be long."})
    (found,) = conversations({"messages": [{"role": "user", "content": "q", "value": "r"},
                                           {"role": "assistant", "content": "a"}]}, where="f.jsonl:3")  # fmt: skip
    assert found.unused == ("messages.value",)


@pytest.mark.parametrize("key", ["train_detail", "loss_mask", "loss_scale", "Weight"])
def test_marks_that_are_not_read_are_refused(key: str) -> None:
    with pytest.raises(DataError, match=f"turn 2 has '{key}', of which nothing is made"):
        turns(messages({}, {key: [0]}))


def test_half_a_character_is_refused_with_its_place() -> None:
    for record in ({"text": "a\ud83d"}, {"instruction": "a", "input": "\udc00", "output": "b"}):
        with pytest.raises(DataError, match=r"f\.jsonl:3 holds '\\ud\w+', half of a character"):
            turns(record)
    with pytest.raises(DataError, match=r"p\.jsonl:1 holds .*half of a character"):
        require_whole_characters(asked({"prompt": "\ud83d"}, where="p.jsonl:1"))
    assert said({"text": "a\U0001f600"})


def test_raw_text_has_no_place_for_a_system_message() -> None:
    with pytest.raises(DataError, match="has 'system', of which nothing is made in this format"):
        turns({"text": "a", "system": "Be brief."})


def test_keys_that_nothing_is_made_of_are_named_each_with_its_place() -> None:
    record = messages({"name": "Ann", "id": 7}) | {"category": "open", "id": 1, "score": None, "tags": []}
    (found,) = conversations(record, where="f.jsonl:3")
    assert sorted(found.unused) == ["category", "id", "messages.id", "messages.name"]
    (found,) = conversations({"instruction": "a", "output": "b", "text": "c"}, where="f.jsonl:3")
    assert found.unused == ("text",)
    instances = {"instruction": "a", "instances": [{"input": "", "output": "b", "kind": 1}]}
    assert conversations(instances, where="f.jsonl:3")[0].unused == ("instances.kind",)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("User", "user"), ("HUMAN", "user"), ("prompter", "user"), ("bot", "assistant"), ("model", "assistant"),
        ("chatgpt", "assistant"), ("developer", "system"), (" assistant ", "assistant"),
    ],
)  # fmt: skip
def test_roles_have_many_names(name: str, role: str) -> None:
    record = {"messages": [{"role": "user", "content": "q"}, {"role": name, "content": "x"},
                           {"role": "assistant", "content": "a"}]}  # fmt: skip
    assert turns(record)[1].role == role


@pytest.mark.parametrize("holder", ["messages", "conversations", "conversation", "dialog", "dialogue"])
@pytest.mark.parametrize(
    ("speaker", "words"), [("role", "content"), ("from", "value"), ("role", "value"), ("role", "text")]
)
def test_holders_and_keys_of_turns_go_together_in_any_way(holder: str, speaker: str, words: str) -> None:
    record = {holder: [{speaker: "user", words: "q"}, {speaker: "assistant", words: "a"}]}
    assert said(record) == [("user", "q", False), ("assistant", "a", True)]


@pytest.mark.parametrize("holder", ["conversations", "conversation", "dialog"])
def test_turns_without_names_take_turns(holder: str) -> None:
    assert said({holder: ["q", "a", "r", ""]}) == [
        ("user", "q", False), ("assistant", "a", True), ("user", "r", False), ("assistant", "", False)
    ]  # fmt: skip


def test_items_may_be_exchanges() -> None:
    record = {
        "conversation": [{"system": "s", "input": "q", "output": "a"}, {"input": "r", "output": "b", "weight": 0}]
    }
    assert said(record) == [
        ("system", "s", False), ("user", "q", False), ("assistant", "a", True),
        ("user", "r", False), ("assistant", "b", False),
    ]  # fmt: skip


@pytest.mark.parametrize("completion", ["a", [{"role": "assistant", "content": "a"}]])
def test_a_prompt_of_turns_is_given_and_the_completion_is_learned(completion: object) -> None:
    prompt = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "q"}]
    wanted = [("user", "p", False), ("assistant", "b", False), ("user", "q", False)]
    assert said({"prompt": prompt, "completion": completion}) == [*wanted, ("assistant", "a", True)]
    assert [(turn.role, turn.said, turn.learn) for turn in asked({"prompt": prompt}, where="").turns] == wanted


def test_columns_of_other_records_do_not_say_what_a_record_is() -> None:
    empty = {"messages": None, "conversations": [], "instruction": None, "prompt": None, "completion": None}
    assert said(empty | {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
    assert said({"messages": None, "instruction": "q", "output": None, "response": "a"})[1] == ("assistant", "a", True)
    assert said({"prompt": None, "completion": None, "question": "q", "answer": "a"})[0] == ("user", "q", False)
    assert said({"instruction": "q", "output": "a", "dialogue": "A: hi"})[0] == ("user", "q", False)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("prompt", "response"), ("question", "response"), ("query", "response"), ("query", "answer"),
        ("problem", "solution"), ("inputs", "targets"), ("prompt", "output"), ("prompt", "answer"),
    ],
)  # fmt: skip
def test_pairs_have_many_names(source: str, target: str) -> None:
    record = {source: "q", target: "a", "system_prompt": "s", "id": 1}
    assert said(record) == [("system", "s", False), ("user", "q", False), ("assistant", "a", True)]
    assert asked({source: "q"}, where="").turns[0].said == "q"


def test_text_in_parts_is_joined_and_other_parts_are_refused() -> None:
    parts = [{"type": "text", "text": "one "}, "two", {"type": "text", "text": " three"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"text": "a"}]}]}
    assert said(record) == [("user", "one two three", False), ("assistant", "a", True)]
    for part, what in (({"type": "image_url", "image_url": {}}, "a part of type 'image_url'"), (7, "a number")):
        with pytest.raises(DataError, match=f"turn 1.*{what}"):
            turns({"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]})


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"prompt": "p"}, [("user", "p")]),
        ({"question": "p", "answer": "x"}, [("user", "p")]),
        ({"instruction": "p", "input": "i"}, [("user", "p\n\ni")]),
        ({"prompt": "p", "system": "s"}, [("system", "s"), ("user", "p")]),
        ({"conversations": [{"from": "human", "value": "p"}]}, [("user", "p")]),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]},
         [("system", "s"), ("user", "p")]),
    ],
)  # fmt: skip
def test_prompts_are_read_as_data_is(record: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    found = asked(record, where="p.jsonl:1").turns
    assert [(turn.role, turn.said) for turn in found] == wanted
    assert not any(turn.learn for turn in found)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "narrator", "content": "a"}]}, "'role' is 'narrator'"),
        ({"messages": [{"role": "system", "content": "a"}]}, "the last turn is the system's"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "the last turn is the assistant's, so nothing is left to answer"),
        ({"words": "a"}, "neither 'prompt' nor 'messages'"),
        ({"prompt": "a", "tools": [1]}, "tools item 1: 'tool' is a number, not an object"),
        ({"prompt": "a", "images": ["x.png"]}, "has 'images'"),
    ],
)  # fmt: skip
def test_prompts_that_ask_nothing_are_refused(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=rf"p\.jsonl:1.*{reason}"):
        asked(record, where="p.jsonl:1")


def test_a_transcript_as_a_prompt_stays_as_it_is() -> None:
    assert asked({"prompt": "### Human: a\n### Assistant:"}, where="").verbatim
    assert not asked({"prompt": "a"}, where="").verbatim
