"""The files of public bug reports in ../shared/cases, each with its right behaviour.

The same inputs stand in other tests, written by hand.
"""

import json
from pathlib import Path

import pytest

from qdist.core.data.conversation import Conversation, Turn
from qdist.core.errors import DataError
from qdist.host.data.records import read_conversations, read_prompts, source_notes
from qdist.runtime.data.tokenized import Summary
from qdist.runtime.data.tokenizing import SampleRules, tokenize
from tests.runtime.data.test_chat_template import learned
from tests.runtime.family_templates import family_tokenizer

CASES = Path(__file__).parents[3].parent / "shared" / "cases"
ANSWER = "A cat eats meal number 1."

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is missing")


def read(name: str, family: str = "chatml") -> tuple[list[str], Summary, list[str]]:
    """Learned texts, what the pass says, and the whole text of each sample."""
    tokenizer = family_tokenizer(family)
    tokenized = tokenize(read_conversations(str(CASES / name)), tokenizer, SampleRules(seq_len=4096))
    whole = [tokenizer.decode(tokenized.tokens[tokenized.span(index)].tolist()) for index in range(len(tokenized))]
    return learned(tokenized, tokenizer), tokenized.summary, whole


@pytest.mark.parametrize("name", ["data.jsonl", "loss_flag.jsonl", "train_flag.jsonl"])
def test_turns_that_are_marked_are_context(name: str) -> None:
    texts, _, whole = read(f"turn-weight/{name}")
    assert texts[0] == f"{ANSWER}<|im_end|>"
    assert all("WRONGANSWER zzz" not in text for text in texts)
    assert all("WRONGANSWER zzz<|im_end|>" in text for text in whole)
    assert "WRONGANSWER zzz<|im_end|>" in read("turn-weight/without.jsonl")[0][0]


def test_systems_and_histories_are_kept() -> None:
    texts, _, whole = read("alpaca-system-history/data.jsonl")
    assert texts[0] == f"Welcome to the zoo.<|im_end|>|{ANSWER}<|im_end|>"
    assert whole[0].startswith("<|im_start|>system\nAnswer like a zookeeper.<|im_end|>")
    first = next(read_conversations(str(CASES / "sharegpt-system-tools/data.jsonl")))
    assert isinstance(first, Conversation)
    assert first.turns[0] == Turn("system", "Answer like a zookeeper.", False)
    assert first.tools == ({"type": "function", "function": {"name": "feed", "parameters": {}}},)
    assert read("sharegpt-system-tools/without.jsonl")[0][0] == f"{ANSWER}<|im_end|>"


@pytest.mark.parametrize("name", ["empty_content.jsonl", "null_content.jsonl"])
def test_calls_without_words_are_learned(name: str) -> None:
    first = next(read_conversations(str(CASES / "tool-calls" / name)))
    assert isinstance(first, Conversation)
    called = {"name": "feed", "arguments": {"n": 1}}
    call = {"type": "function", "id": "c1", "function": called}
    assert first.turns[1] == Turn("assistant", "", True, calls=(call,))
    assert first.tools[0]["function"]["name"] == "feed"


def test_reasoning_is_learned() -> None:
    texts, summary, _ = read("r1-think-dropped/data.jsonl", "r1")
    record = json.loads((CASES / "r1-think-dropped" / "data.jsonl").read_text().splitlines()[0])
    assert texts[0] == record["messages"][1]["content"] + "<|end|>"
    assert any("leaves out the reasoning" in note for note in summary.notes)


def test_every_answer_is_learned_with_a_template_that_writes_the_last_otherwise() -> None:
    record = json.loads((CASES / "qwen3-multi-turn" / "data.jsonl").read_text().splitlines()[0])
    said = [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]
    assert read("qwen3-multi-turn/data.jsonl", "qwen3")[0][: len(said)] == [f"{text}<|im_end|>" for text in said]


def test_empty_answers_are_dropped_and_counted() -> None:
    _, summary, _ = read("empty-answer/data.jsonl")
    assert (summary.records, summary.dropped) == (24, 12)
    assert "12 of 24 records were dropped: the answer is empty" in summary.notes


def test_a_base_models_answers_end_with_their_turn() -> None:
    _, summary, _ = read("qwen-base-eos/data.jsonl")
    assert summary.wording is not None
    assert family_tokenizer("chatml").convert_ids_to_tokens(list(summary.wording.ends)) == ["<|im_end|>"]


@pytest.mark.parametrize(
    "name",
    [
        "content-list/data.jsonl", "conversations-role-content/data.jsonl",
        "conversations-role-content/from_value_in_messages.jsonl", "conversations-role-content/response.jsonl",
        "json-dict-data/one_line.json", "json-dict-data/one_record.json", "json-dict-data/pretty.json",
        "jsonl-array/data.jsonl", "jsonl-array/oneline.jsonl",
        "folder-train-test/ds", "folder-train-test/factory", "folder-train-test/hub_clone", "save-to-disk/ds",
        "save-to-disk/dd",
    ],
)  # fmt: skip
def test_forms_of_data_are_read(name: str) -> None:
    texts, summary, _ = read(name)
    assert all(text.endswith("<|im_end|>") and text != "<|im_end|>" for text in texts)
    assert summary.dropped == 0


def test_a_test_file_is_not_trained_on() -> None:
    (note,) = source_notes(str(CASES / "folder-train-test" / "ds"))
    assert "test.jsonl" in note
    lines = (CASES / "folder-train-test" / "ds" / "train.jsonl").read_text().splitlines()
    assert len(read("folder-train-test/ds")[0]) == len(lines)


@pytest.mark.parametrize("name", ["User", "bot", "developer", "model"])
def test_names_of_roles_are_known(name: str) -> None:
    assert read(f"role-names/{name}.jsonl")[0]


@pytest.mark.parametrize("name", ["observation", "tool"])
def test_what_a_tool_returns_is_context(name: str) -> None:
    (found,) = read_conversations(str(CASES / "role-names" / f"{name}.jsonl"))
    assert isinstance(found, Conversation)
    assert found.turns[1:] == (Turn("tool", "x", False), Turn("assistant", "yo", True))


def test_a_call_that_is_not_json_is_refused() -> None:
    (found,) = read_conversations(str(CASES / "role-names" / "function_call.jsonl"))
    assert isinstance(found, DataError)
    assert "function_call.jsonl:1, turn 2: 'content' is text that is not JSON" in found.message


def test_a_template_that_refuses_a_system_message_refuses_the_record() -> None:
    assert read("system-refused/data.jsonl", "gemma")[0]
    with pytest.raises(DataError, match="System role not supported"):
        read("system-refused/data_system.jsonl", "gemma")


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("bom.jsonl", ["What does a cat eat?"]),
        ("bom.txt", ["What does a cat eat?"]),
        ("u2028.jsonl", ["line one\u2028line two"]),
        ("array.json", ["What does a cat eat?", "And a dog?"]),
    ],
)
def test_prompt_files_are_read_as_data_is(name: str, prompts: list[str]) -> None:
    assert [prompt.turns[-1].said for prompt in read_prompts(CASES / "prompts-file" / name)] == prompts


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("prompts-file/latin1.txt", "is not UTF-8"),
        ("prompts-roles/asst.jsonl", "the last turn is the assistant's"),
        ("prompts-roles/sysonly.jsonl", "the last turn is the system's"),
        ("prompts-roles/p.jsonl", "narrator"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_prompts(CASES / name)
