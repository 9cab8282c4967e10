"""Tools, calls and results reach a conversation in OpenAI's form, whatever form the record has."""

import json
from typing import Any

import pytest

from qdist.core.data.conversation import Conversation, Turn
from qdist.core.data.records import asked, conversations
from qdist.core.errors import DataError

FUNCTION = {"name": "feed", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}
TOOL = {"type": "function", "function": FUNCTION}
CALLED = {"name": "feed", "arguments": {"n": 1}}
CALL = {"type": "function", "function": CALLED}


def read(record: dict[str, Any]) -> Conversation:
    (found,) = conversations(record, where="f.jsonl:3")
    return found


def talk(answer: dict[str, Any], *after: dict[str, Any], **beside: Any) -> dict[str, Any]:
    """A conversation whose second turn is `answer`."""
    return {"messages": [{"role": "user", "content": "Feed."}, {"role": "assistant"} | answer, *after]} | beside


@pytest.mark.parametrize(
    "given",
    [
        [TOOL], [FUNCTION], TOOL, FUNCTION, json.dumps([TOOL]), json.dumps([FUNCTION]), [json.dumps(TOOL)],
        [{"type": "function", **FUNCTION}], [{**FUNCTION, "parameters": json.dumps(FUNCTION["parameters"])}],
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_have_many_forms(given: object, key: str) -> None:
    found = read(talk({"content": "a"}, **{key: given}))
    assert (found.tools, found.unused) == ((TOOL,), ())


def test_what_stands_beside_a_function_is_kept() -> None:
    strict = {"type": "function", "strict": True, "function": FUNCTION | {"description": "Feeds."}}
    assert read(talk({"content": "a"}, tools=[strict])).tools == (strict,)


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "instances": [{"output": "a"}]},
    ],
)
def test_tools_stand_beside_records_of_every_format_that_has_turns(record: dict[str, Any]) -> None:
    found = read(record | {"tools": [TOOL], "system": "Be brief."})
    assert found.tools == (TOOL,)
    assert found.turns[0] == Turn("system", "Be brief.", False)


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("[{", "f.jsonl:3: 'tools' is text that is not JSON"),
        ("[" * 4000, "f.jsonl:3: 'tools' is text that is not JSON"),
        ("\ud800", "f.jsonl:3: 'tools' is text that is not JSON"),
        ([{"type": "web_search"}], "f.jsonl:3, tools item 1 is of type 'web_search', and only functions are called"),
        ([FUNCTION, {"parameters": {}}], "f.jsonl:3, tools item 2 names no function: 'name' is null"),
        ([{"name": " "}], "f.jsonl:3, tools item 1 names no function: 'name' is empty"),
        ([TOOL | {"function": "feed"}], "f.jsonl:3, tools item 1: 'function' is text that is not JSON"),
        (7, "f.jsonl:3, tools item 1: 'tool' is a number, not an object"),
    ],
)
def test_what_is_not_a_tool_is_refused_with_its_place(tools: object, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(talk({"content": "a"}, tools=tools))
    assert said in caught.value.message
    assert caught.value.try_


def test_of_two_lists_of_tools_one_is_refused_unless_they_are_equal() -> None:
    assert read(talk({"content": "a"}, tools=[TOOL], functions=[TOOL])).tools == (TOOL,)
    with pytest.raises(DataError, match=r"f\.jsonl:3 has 'tools' and 'functions'"):
        read(talk({"content": "a"}, tools=[TOOL], functions=[{"name": "pet"}]))


@pytest.mark.parametrize(
    "given",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"function": {"name": "feed", "arguments": '{"n": 1}'}, "type": "function", "id": None}]},
        {"tool_calls": [CALLED]}, {"tool_calls": CALLED}, {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"name": "feed", "parameters": {"n": 1}}]},
        {"function_call": CALLED}, {"function_call": {"name": "feed", "arguments": '{"n": 1}'}},
        {"function_call": json.dumps(CALLED)},
    ],
)  # fmt: skip
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_calls_have_many_forms_and_need_no_words(given: dict[str, Any], content: dict[str, Any]) -> None:
    found = read(talk(given | content))
    assert found.turns[1] == Turn("assistant", "", True, calls=(CALL,))
    assert found.unused == ()


def test_a_call_keeps_its_words_its_thoughts_and_its_id() -> None:
    said = {"content": "Let me see.", "reasoning_content": "Hm.", "tool_calls": [CALL | {"id": "c1", "index": 0}]}
    found = read(talk(said))
    assert found.turns[1] == Turn("assistant", "Let me see.", True, thoughts="Hm.", calls=({"id": "c1", **CALL},))
    assert found.unused == ("messages.tool_calls.index",)


@pytest.mark.parametrize("arguments", [{"arguments": "{}"}, {"arguments": ""}, {"arguments": None}, {}])
def test_a_call_may_have_no_arguments(arguments: dict[str, Any]) -> None:
    (called,) = read(talk({"tool_calls": [{"name": "feed"} | arguments]})).turns[1].calls
    assert called["function"] == {"name": "feed", "arguments": {}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tool_calls": "feed(1)"}, "f.jsonl:3, turn 2: 'tool_calls' is text that is not JSON"),
        (
            {"tool_calls": [{"name": "feed", "arguments": "{n: 1}"}]},
            "turn 2, call 1: 'arguments' is text that is not J",
        ),
        ({"tool_calls": [{"name": "feed", "arguments": [1]}]}, "turn 2, call 1: 'arguments' is a list, not an object"),
        ({"tool_calls": [CALL, {"arguments": {}}]}, "turn 2, call 2 names no function: 'name' is null"),
        ({"tool_calls": [CALL, 7]}, "turn 2, call 2: 'tool_calls' is a number, not an object"),
        ({"tool_calls": [{"type": "custom", "custom": {}}]}, "turn 2, call 1 is of type 'custom'"),
        ({"tool_calls": [CALL], "function_call": {"name": "pet"}}, "turn 2 has 'tool_calls' and 'function_call'"),
    ],
)
def test_a_malformed_call_is_refused_with_its_place(given: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(talk(given))
    assert said in caught.value.message
    assert caught.value.try_


@pytest.mark.parametrize("name", ["tool", "function", "observation", "ipython", "tool_response"])
def test_what_a_tool_returns_is_context(name: str) -> None:
    result = {"role": name, "content": "ok", "tool_call_id": "c1"}
    found = read(talk({"tool_calls": [CALL | {"id": "c1"}]}, result, {"role": "assistant", "content": "Done."}))
    assert found.turns[2:] == (
        Turn("tool", "ok", False, tool="feed", call_id="c1"), Turn("assistant", "Done.", True)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("ok", "ok"), (None, ""), ({"fed": True}, '{"fed": true}'), ([1, "é"], '[1, "é"]'), ([], "[]"),
        ([{"type": "text", "text": "o"}, {"type": "text", "text": "k"}], "ok"),
        ([{"type": "cat"}], '[{"type": "cat"}]'),
    ],
)  # fmt: skip
def test_results_are_text_or_values(content: object, text: str) -> None:
    assert read(talk({"tool_calls": [CALL]}, {"role": "tool", "content": content})).turns[2].text == text


def test_an_image_that_a_tool_returns_is_refused() -> None:
    with pytest.raises(DataError, match="turn 3 holds a part of type 'image_url', and only text is trained"):
        read(talk({"tool_calls": [CALL]}, {"role": "tool", "content": [{"type": "image_url", "image_url": {}}]}))


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ({"tool_call_id": "b"}, {"tool_call_id": "a"}, ["pet", "feed"]),
        ({}, {}, ["feed", "pet"]),
        ({"name": "other"}, {}, ["other", "pet"]),
        ({"tool_call_id": "x"}, {"tool_call_id": "a"}, ["", "feed"]),
    ],
)  # fmt: skip
def test_results_are_named_after_their_calls(first: dict[str, str], second: dict[str, str], names: list[str]) -> None:
    calls = {"tool_calls": [{"id": "a", "name": "feed"}, {"id": "b", "name": "pet"}]}
    results = ({"role": "tool", "content": "1"} | first, {"role": "tool", "content": "2"} | second)
    assert [turn.tool for turn in read(talk(calls, *results)).turns[2:]] == names


def test_sharegpt_has_turns_of_calls_and_of_observations() -> None:
    called = "<think>\nHungry.\n</think>\n" + json.dumps([CALLED])
    record = {"conversations": [
        {"from": "human", "value": "Feed."}, {"from": "function_call", "value": called},
        {"from": "observation", "value": {"fed": 1}}, {"from": "gpt", "value": "Done."},
    ], "system": "Be brief.", "tools": json.dumps([FUNCTION])}  # fmt: skip
    found = read(record)
    assert found.turns == (
        Turn("system", "Be brief.", False), Turn("user", "Feed.", False),
        Turn("assistant", "", True, thoughts="Hungry.", calls=(CALL,)),
        Turn("tool", '{"fed": 1}', False, tool="feed"), Turn("assistant", "Done.", True),
    )  # fmt: skip
    assert found.tools == (TOOL,)


@pytest.mark.parametrize("value", [CALLED, [CALLED], json.dumps(CALLED), json.dumps([CALLED])])
def test_a_turn_of_calls_holds_one_or_several(value: object) -> None:
    record = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]}
    assert read(record).turns[1].calls == (CALL,)


def test_a_turn_of_calls_that_holds_words_is_refused() -> None:
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "function_call", "content": "x"},
                           {"role": "assistant", "content": "yo"}]}  # fmt: skip
    with pytest.raises(DataError, match=r"f\.jsonl:3, turn 2: 'content' is text that is not JSON"):
        read(record)


@pytest.mark.parametrize(("mark", "learns"), [({"weight": 0}, False), ({"loss": False}, False), ({"train": 1}, True)])
def test_a_call_can_be_marked(mark: dict[str, Any], learns: bool) -> None:
    found = read(talk({"tool_calls": [CALL]} | mark, {"role": "tool", "content": "ok"}))
    assert found.turns[1].learn is learns
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": CALLED} | mark]}
    assert read(shared).turns[1].learn is learns


def test_a_result_cannot_be_marked_to_be_learned() -> None:
    with pytest.raises(DataError, match="turn 3 is the tool's and is marked to be learned"):
        read(talk({"tool_calls": [CALL]}, {"role": "tool", "content": "ok", "weight": 1}))


def test_a_prompt_may_end_with_what_a_tool_returned() -> None:
    waiting = talk({"tool_calls": [CALL]}, {"role": "tool", "content": "ok"}, tools=[TOOL])
    found = asked(waiting, where="p.jsonl:1")
    assert found.turns[1:] == (Turn("assistant", "", False, calls=(CALL,)), Turn("tool", "ok", False, tool="feed"))
    assert found.tools == (TOOL,)
    with pytest.raises(DataError, match="the last turn is the assistant's, so nothing is left to answer"):
        asked(talk({"tool_calls": [CALL]}), where="p.jsonl:1")


def test_half_a_character_in_a_call_is_refused() -> None:
    with pytest.raises(DataError, match="half of a character"):
        read(talk({"tool_calls": [{"name": "feed", "arguments": {"what": "\ud83d"}}]}))


@pytest.mark.parametrize(
    "record",
    [
        talk({"content": "a"}, tools=[TOOL]), talk({"tool_calls": [CALL]}),
        {"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "r"},
                      {"role": "assistant", "content": "a"}]},
    ],
)  # fmt: skip
def test_plain_text_has_no_words_for_tools(record: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:3 has tools, and only a chat template can write them"):
        read(record).segments()
