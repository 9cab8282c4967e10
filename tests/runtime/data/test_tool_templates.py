"""What is learned of calls, results and reasoning by fifteen families' templates: written by hand, or the refusal.

The templates' own mask, `{% generation %}`, is the other witness.
"""

import re
from typing import Any

import pytest
from msgspec.structs import replace

from qdist.core.data.conversation import Conversation, Turn
from qdist.core.errors import DataError
from qdist.runtime.data.messages import messages_of, template_of, tools_of
from qdist.runtime.data.tokenized import IGNORED, TokenizedSet
from qdist.runtime.data.tokenizing import SampleRules, tokenize
from qdist.runtime.data.wording import encode_prompt
from tests.runtime.data.test_chat_template import before_each, learned, trained
from tests.runtime.family_templates import family_tokenizer
from tests.runtime.tool_templates import TOOL_FAMILIES, tool_tokenizer


def u(text: str) -> Turn:
    return Turn("user", text, False)


def a(text: str, **beside: Any) -> Turn:
    return Turn("assistant", text, True, **beside)


def said(*turns: Turn, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation(turns=turns, where="d.jsonl:1", tools=tools)


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "call00001", "function": {"name": "feed", "arguments": arguments}}


CALL = call(n=1, who="cat")
TOOL = {"type": "function", "function": {"name": "feed", "description": "Feeds.", "parameters": {}}}
RESULT = Turn("tool", "ok", False, tool="feed", call_id="call00001")
SYSTEM = Turn("system", "Be brief.", False)
TALKS = {
    "one": said(u("q"), a("b")),
    "several": said(u("q"), a("b"), u("r"), a("d")),
    "system": said(SYSTEM, u("q"), a("b"), u("r"), a("d")),
    "tools": said(u("q"), a("", calls=(CALL,)), RESULT, a("d"), tools=(TOOL,)),
    "thoughts": said(u("q"), a("b", thoughts="t u"), u("r"), a("d", thoughts="v w")),
    "thought call": said(u("q"), a("", thoughts="t u", calls=(CALL,)), RESULT, a("d", thoughts="v w"), tools=(TOOL,)),
}
"""What is asked of every family."""

JSON = '{"n": 1, "who": "cat"}'
HERMES = f'<tool_call>\n{{"name": "feed", "arguments": {JSON}}}\n</tool_call>'
GLM = "feed\n<arg_key>n</arg_key>\n<arg_value>1</arg_value>\n<arg_key>who</arg_key>\n<arg_value>cat</arg_value>\n"
TU, VW = "<think>\nt u\n</think>", "<think>\nv w\n</think>"
NO_CALL, NO_TEXT = "does not write the call of turn 2, 'feed'", f"does not write the text of turn 2, {TU[:20]!r}"


def ended(end: str, *, apart: bool = False, before: str = "") -> dict[str, list[str] | str]:
    """The learned text of a template that writes text alone."""
    first, second = f"{before}b{end}", f"{before}d{end}"
    thought = [f"{before}{TU}\n\nb{end}", f"{before}{VW}\n\nd{end}"]
    both = [first, second] if apart else [f"{first}|{second}"]
    return {
        "one": [first], "several": both, "system": both, "tools": NO_CALL, "thought call": NO_CALL,
        "thoughts": thought if apart else ["|".join(thought)],
    }  # fmt: skip


IM, EOT, TEXT, TURN = "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|END_OF_TURN_TOKEN|>"
FINAL, ANALYSIS = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>"
TO = f" to=functions.feed<|channel|>commentary json<|message|>{JSON}<|call|>"
GRANITE = f'<|tool_call|>[{{"name": "feed", "arguments": {JSON}}}]{TEXT}'
COMMAND = f'<|START_ACTION|>[{{"tool_name": "feed", "parameters": {JSON}}}]<|END_ACTION|>{TURN}'
BY_HAND: dict[str, dict[str, list[str] | str]] = {
    "qwen2.5": ended(IM) | {
        "tools": [f"{HERMES}{IM}|d{IM}"], "thought call": [f"{TU}\n{HERMES}{IM}|{VW}\n\nd{IM}"],
    },
    "qwen3": ended(IM, apart=True) | {
        "tools": [f"{HERMES}{IM}", f"d{IM}"], "thought call": [f"{TU}\n\n{HERMES}{IM}|{VW}\n\nd{IM}"],
    },
    "llama3.1": ended(EOT, apart=True) | {
        "tools": [f'{{"name": "feed", "parameters": {JSON}}}{EOT}', f"d{EOT}"], "thought call": NO_TEXT,
    },
    "llama2": ended(" </s>", before=" "),
    "mistral": ended("</s>", before=" ") | {
        "system": [" b</s>", " d</s>"], "thought call": NO_TEXT,
        "tools": [f'[TOOL_CALLS] [{{"name": "feed", "arguments": {JSON}, "id": "call00001"}}]</s>| d</s>'],
    },
    "gemma3": ended("<end_of_turn>"),
    "phi4": ended("<|end|><|endoftext|>", apart=True),
    "zephyr": ended("</s>"),
    "r1": ended("<|end|>") | {
        "tools": [f"<|call|>function<|sep|>feed\n```json\n{JSON}\n```<|/call|><|end|>|d<|end|>"],
        "thoughts": [f"{TU}\n\nb<|end|>", f"{VW}\n\nd<|end|>"], "thought call": NO_TEXT,
    },
    "glm4.5": {
        "one": ["b<|endoftext|>"], "several": ["b|d<|endoftext|>"], "system": ["b|d<|endoftext|>"],
        "tools": [f"<tool_call>{GLM}</tool_call>|d<|endoftext|>"],
        "thoughts": ["\n<think>t u</think>\nb<|endoftext|>", "\n<think>v w</think>\nd<|endoftext|>"],
        "thought call": [f"\n<think>t u</think><tool_call>{GLM}</tool_call>|\n<think>v w</think>\nd<|endoftext|>"],
    },
    "harmony": {
        "one": ["b<|return|>"], "several": ["b<|return|>", "d<|return|>"], "system": ["b<|return|>", "d<|return|>"],
        "tools": [f"{TO}|{FINAL}d<|return|>"],
        "thoughts": [f"{ANALYSIS}t u<|end|><|start|>assistant{FINAL}b<|return|>",
                     f"{ANALYSIS}v w<|end|><|start|>assistant{FINAL}d<|return|>"],
        "thought call": [f"{ANALYSIS}t u<|end|><|start|>assistant{TO}|"
                         f"{ANALYSIS}v w<|end|><|start|>assistant{FINAL}d<|return|>"],
    },
    "smollm3": ended(IM),
    "granite": ended(TEXT) | {
        "tools": [f"{GRANITE}|d{TEXT}"], "thought call": [f"{TU}{GRANITE}|{VW}\n\nd{TEXT}"],
    },
    "command-r": ended(TURN) | {
        "tools": [f"{COMMAND}|d{TURN}"], "thought call": [f"{TU}{COMMAND}|{VW}\n\nd{TURN}"],
    },
    "olmo": ended("<|endoftext|>"),
}  # fmt: skip
OTHER_MASK = {
    # The end of the text is behind the block, of the last turn alone.
    **{("phi4", talk): "leaves out '<|endoftext|>'" for talk in ("one", "several", "system", "thoughts")},
    # The second header of a turn with a thought and a call is between two blocks.
    ("harmony", "thought call"): "leaves out '<|start|>assistant' of turn 2",
}


@pytest.mark.parametrize("marked", [False, True], ids=["", "marked"])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("family", BY_HAND)
def test_learned_tokens_are_those_written_by_hand_or_the_record_is_refused(
    family: str, talk: str, marked: bool
) -> None:
    tokenizer, expected = tool_tokenizer(family, marked=marked), BY_HAND[family][talk]
    if marked and (family, talk) in OTHER_MASK:
        expected = OTHER_MASK[family, talk]
    if isinstance(expected, str):
        with pytest.raises(DataError) as caught:
            trained(tokenizer, TALKS[talk])
        assert expected in caught.value.message
        assert caught.value.try_
    else:
        assert learned(trained(tokenizer, TALKS[talk]), tokenizer) == expected


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("family", BY_HAND)
def test_answers_stand_behind_the_tokens_that_a_model_is_given(family: str, talk: str) -> None:
    if isinstance(BY_HAND[family][talk], str):
        return
    tokenizer, found = tool_tokenizer(family), TALKS[talk]
    tokenized = trained(tokenizer, found)
    wording = tokenized.summary.wording
    assert wording is not None
    prompts = [
        encode_prompt(replace(found, turns=found.turns[:at]), tokenizer, replace(wording, lead=""))
        for at, turn in enumerate(found.turns)
        if turn.learn
    ]
    for tokens, prompt in zip(before_each(tokenized), prompts, strict=True):
        lead = tokenizer.decode(tokens[len(prompt) :])
        assert tokens[: len(prompt)] == prompt
        assert not lead or "</think>" in lead or lead == FINAL


def own_mask(tokenizer: Any, found: Conversation) -> tuple[list[int], list[bool]]:
    """transformers' tokens and mask of a conversation."""
    template = template_of(tokenizer, found)
    as_text = "| tojson" not in template.source
    messages = messages_of(found.turns, template, as_text=as_text)
    given = tokenizer.apply_chat_template(
        messages, tools=tools_of(found), return_dict=True, return_assistant_tokens_mask=True
    )
    return given["input_ids"], [bool(own) for own in given["assistant_masks"]]


def our_mask(tokenized: TokenizedSet) -> tuple[list[int], list[bool]]:
    return tokenized.tokens.tolist(), (tokenized.labels != IGNORED).tolist()


GIVEN = re.compile(r"(<\|im_start\|>assistant)?\s*(<think>\s*</think>)?\s*|" + re.escape(FINAL))
"""What stands within a block and is not learned: header, closed thought, channel, white space behind the end."""


@pytest.mark.parametrize("talk", ["one", "several", "system", "tools"])
@pytest.mark.parametrize("family", BY_HAND)
def test_our_mask_is_the_one_of_transformers(family: str, talk: str) -> None:
    tokenizer, found = tool_tokenizer(family, marked=True), TALKS[talk]
    expected = BY_HAND[family][talk]
    if isinstance(expected, str) or (family, talk) in OTHER_MASK or len(expected) > 1:
        return  # refused, or a sample for each answer
    tokens, ours = our_mask(trained(tokenizer, found))
    theirs, mask = own_mask(tokenizer, found)
    if tokens[: len(theirs)] == theirs:
        assert not [place for place, own in enumerate(mask) if ours[place] and not own]
        more = tokenizer.decode([token for token, own, our in zip(theirs, mask, ours, strict=False) if own and not our])
        assert GIVEN.sub("", more) == ""
    else:  # an answer is tokenized behind its header as a model is asked, not together with it
        learned_text = tokenizer.decode([token for token, our in zip(tokens, ours, strict=True) if our])
        text = tokenizer.decode([token for token, own in zip(theirs, mask, strict=True) if own])
        assert GIVEN.sub("", text) == learned_text


def with_source(name: str, old: str, new: str) -> Any:
    tokenizer = tool_tokenizer(name, marked=True)
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    return tokenizer


BLOCK = "{% generation %}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>", "leaves out '<|im_end|>' of turn 2"),
        (BLOCK + "{{ m.content }}", "{{ m.content }}" + BLOCK, "leaves out 'b' of turn 2"),
        ("user\n{{ m.content }}", f"user\n{BLOCK}{{{{ m.content }}}}{{% endgeneration %}}",
         "has 'q' as well as turn 2"),
    ],
)  # fmt: skip
def test_a_mask_that_differs_is_refused_with_the_first_text_that_does(old: str, new: str, message: str) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:1: the chat template's own mask, by \{% generation %\}") as caught:
        trained(with_source("qwen2.5", old, new), TALKS["one"])
    assert message in caught.value.message


def test_a_block_may_be_around_header_and_all() -> None:
    tokenizer = with_source("qwen2.5", f"<|im_start|>assistant\n{BLOCK}", BLOCK + "{{ '<|im_start|>assistant\n' }}")
    assert learned(trained(tokenizer, TALKS["several"]), tokenizer) == ["b<|im_end|>|d<|im_end|>"]


def test_answers_that_are_not_to_be_learned_are_not_compared() -> None:
    tokenizer = tool_tokenizer("qwen2.5", marked=True)
    found = said(u("q"), replace(a("WRONG"), learn=False), u("r"), a("d"))
    assert learned(trained(tokenizer, found), tokenizer) == ["d<|im_end|>"]


def test_half_of_a_call_is_refused_with_what_is_missing() -> None:
    tokenizer = with_source("qwen2.5", ', "arguments": {{ c.function.arguments | tojson }}', "")
    with pytest.raises(DataError, match="does not write 'n' in the call of turn 2, 'feed'") as caught:
        trained(tokenizer, TALKS["tools"])
    assert caught.value.try_.startswith("--set data.template=chatml")


@pytest.mark.parametrize("family", ["qwen2.5", "r1", "glm4.5", "harmony", "granite"])
def test_arguments_of_every_kind_are_found_in_the_call(family: str) -> None:
    arguments = {"text": 'a "b"\n\\ é <&>', "yes": True, "none": None, "deep": {"list": [1, 2.5, {"x": "y"}]}, "e": {}}
    tokenizer = tool_tokenizer(family)
    found = said(u("q"), a("", calls=(call(**arguments),)), RESULT, a("d"), tools=(TOOL,))
    assert learned(trained(tokenizer, found), tokenizer)


def test_a_call_that_is_not_learned_must_be_written_too() -> None:
    found = said(u("q"), replace(a("", calls=(CALL,)), learn=False), RESULT, a("d"), tools=(TOOL,))
    with pytest.raises(DataError, match="does not write the call of turn 2, 'feed'"):
        trained(family_tokenizer("chatml"), found)
    tokenizer = tool_tokenizer("qwen2.5", marked=True)
    assert learned(trained(tokenizer, found), tokenizer) == ["d<|im_end|>"]


def test_arguments_are_never_learned_as_python_prints_them() -> None:
    """A template that writes what it is given wants text."""
    tokenizer = with_source("qwen2.5", "c.function.arguments | tojson", "c.function.arguments")
    assert learned(trained(tokenizer, TALKS["tools"]), tokenizer) == [f"{HERMES}{IM}|d{IM}"]


def test_the_result_of_a_tool_that_is_not_written_is_refused() -> None:
    tokenizer = with_source("qwen2.5", "{% elif m.role == 'tool' %}", "{% elif m.role == 'nobody' %}")
    with pytest.raises(DataError, match="does not write the result of a tool, turn 3"):
        trained(tokenizer, TALKS["tools"])


def test_tools_that_are_not_written_are_told() -> None:
    note = "the chat template does not write which tools there are: in 1 of 2 records"
    tokenizer = tool_tokenizer("command-r")
    summary = trained(tokenizer, TALKS["tools"], TALKS["one"]).summary
    assert any(own.startswith(note) for own in summary.notes)
    tokenizer = tool_tokenizer("qwen2.5")
    assert not any("which tools" in own for own in trained(tokenizer, TALKS["tools"], TALKS["one"]).summary.notes)


def test_a_model_chooses_between_a_call_and_an_answer_by_itself() -> None:
    """Harmony's channel is given where every answer has the same, and learned where some are calls."""
    tokenizer = tool_tokenizer("harmony")
    mixed = trained(tokenizer, TALKS["one"], TALKS["tools"]).summary.wording
    alone = trained(tokenizer, TALKS["one"]).summary.wording
    assert mixed is not None
    assert alone is not None
    assert (mixed.lead, alone.lead) == ("", FINAL)


def test_the_template_for_tools_is_taken_where_there_are_several() -> None:
    tokenizer = family_tokenizer("chatml")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": tool_tokenizer("qwen2.5").chat_template}
    assert learned(trained(tokenizer, TALKS["tools"]), tokenizer) == [f"{HERMES}{IM}|d{IM}"]


def test_a_call_that_ends_otherwise_than_an_answer_ends_with_its_own_marker() -> None:
    tokenizer = tool_tokenizer("harmony")
    wording = trained(tokenizer, TALKS["tools"]).summary.wording
    assert wording is not None
    assert tokenizer.convert_ids_to_tokens(list(wording.ends)) == ["<|return|>", "<|call|>"]


def test_everything_is_learned_of_an_answer_that_only_calls() -> None:
    found = tokenize([TALKS["tools"]], tool_tokenizer("qwen2.5"), SampleRules(seq_len=4096))
    assert found.summary.dropped == 0
    assert set(TOOL_FAMILIES) == set(BY_HAND)
