"""What a chat template writes is compared with what the record said: learned tokens are those written here by hand."""

from typing import Any

import pytest
from msgspec.structs import replace

from qdist.core.data.conversation import Conversation
from qdist.core.data.records import conversations
from qdist.core.errors import DataError, ModelError
from qdist.runtime.data.chat_template import prompt_text, require_template
from qdist.runtime.data.tokenized import IGNORED, TokenizedSet
from qdist.runtime.data.tokenizing import SampleRules, tokenize
from qdist.runtime.data.wording import encode_prompt
from tests.runtime.family_templates import FAMILIES, family_tokenizer, pieces_tokenizer


def u(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def a(text: str, **marks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **marks}


def conversation(*messages: dict[str, Any], **beside: Any) -> Conversation:
    return conversations({"messages": list(messages), **beside}, where="d.jsonl:1")[0]


def trained(tokenizer: Any, *found: Conversation) -> TokenizedSet:
    return tokenize(found, tokenizer, SampleRules(seq_len=4096))


def learned(tokenized: TokenizedSet, tokenizer: Any) -> list[str]:
    """The learned text of each sample, its stretches joined by a bar."""
    texts = []
    for index in range(len(tokenized)):
        span = tokenized.span(index)
        tokens, labels = tokenized.tokens[span].tolist(), tokenized.labels[span].tolist()
        stretches: list[list[int]] = [[]]
        for token, label in zip(tokens, labels, strict=True):
            if label == IGNORED:
                stretches.append([])
            else:
                stretches[-1].append(token)
        texts.append("|".join(tokenizer.decode(stretch) for stretch in stretches if stretch))
    return texts


ONE = (u("What does the cat eat?"), a("A meal."))
TWO = (u("q"), a("b"), u("again"), a("  d e\n"))
MARKED = (u("q"), a("WRONG zzz", weight=0), u("again"), a("right", weight=1))
THOUGHT = (u("q"), a("<think>\nThe cat.\n</think>\n\nA meal."))

BY_HAND = {
    "chatml": (
        ["A meal.<|im_end|>"], ["b<|im_end|>|  d e\n<|im_end|>"], ["right<|im_end|>"],
        ["<think>\nThe cat.\n</think>\n\nA meal.<|im_end|>"],
    ),
    "smollm2": (
        ["A meal.<|im_end|>"], ["b<|im_end|>|  d e\n<|im_end|>"], ["right<|im_end|>"],
        ["<think>\nThe cat.\n</think>\n\nA meal.<|im_end|>"],
    ),
    "llama2": (
        [" A meal. </s>"], [" b </s>| d e </s>"], [" right </s>"],
        [" <think>\nThe cat.\n</think>\n\nA meal. </s>"],
    ),
    "llama3": (
        ["A meal.<|eot_id|>"], ["b<|eot_id|>", "d e<|eot_id|>"], ["right<|eot_id|>"],
        ["<think>\nThe cat.\n</think>\n\nA meal.<|eot_id|>"],
    ),
    "mistral": (
        [" A meal.</s>"], [" b</s>| d e</s>"], [" right</s>"], [" <think>\nThe cat.\n</think>\n\nA meal.</s>"],
    ),
    "gemma": (
        ["A meal.<end_of_turn>"], ["b<end_of_turn>|d e<end_of_turn>"], ["right<end_of_turn>"],
        ["<think>\nThe cat.\n</think>\n\nA meal.<end_of_turn>"],
    ),
    "phi3": (
        ["A meal.<|end|>\n<|endoftext|>"], ["b<|end|>|  d e\n<|end|>\n<|endoftext|>"],
        ["right<|end|>\n<|endoftext|>"], ["<think>\nThe cat.\n</think>\n\nA meal.<|end|>\n<|endoftext|>"],
    ),
    "vicuna": (
        [" A meal.</s>"], [" b</s>|   d e\n</s>"], [" right</s>"], [" <think>\nThe cat.\n</think>\n\nA meal.</s>"],
    ),
    "qwen3": (
        ["A meal.<|im_end|>"], ["b<|im_end|>", "  d e\n<|im_end|>"], ["right<|im_end|>"],
        ["<think>\nThe cat.\n</think>\n\nA meal.<|im_end|>"],
    ),
    "r1": (
        ["A meal.<|end|>"], ["b<|end|>|  d e\n<|end|>"], ["right<|end|>"],
        ["<think>\nThe cat.\n</think>\n\nA meal.<|end|>"],
    ),
    "qwen3-thinking": (
        ["A meal.<|im_end|>"], ["b<|im_end|>", "  d e\n<|im_end|>"], ["right<|im_end|>"],
        ["The cat.\n</think>\n\nA meal.<|im_end|>"],
    ),
    "harmony": (
        ["A meal.<|return|>"], ["b<|return|>", "  d e\n<|return|>"], ["right<|return|>"],
        ["<think>\nThe cat.\n</think>\n\nA meal.<|return|>"],
    ),
    "glm4": (
        ["A meal.<|endoftext|>"], ["b|  d e\n<|endoftext|>"], ["right<|endoftext|>"],
        ["<think>\nThe cat.\n</think>\n\nA meal.<|endoftext|>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", BY_HAND)
@pytest.mark.parametrize("number", range(4))
def test_learned_tokens_are_those_written_by_hand(family: str, number: int) -> None:
    tokenizer = family_tokenizer(family)
    record = (ONE, TWO, MARKED, THOUGHT)[number]
    assert learned(trained(tokenizer, conversation(*record)), tokenizer) == BY_HAND[family][number]


@pytest.mark.parametrize("family", BY_HAND)
def test_tokens_before_an_answer_are_what_generation_is_given(family: str) -> None:
    """Header, lead and all: the prompt of the same turns, worded as the run was, is where the answer begins."""
    tokenizer = family_tokenizer(family)
    tokenized = trained(tokenizer, conversation(*ONE), conversation(u("a"), a("  Meal.\n")))
    wording = tokenized.summary.wording
    assert wording is not None
    for index, question in enumerate((ONE[0], u("a"))):
        labels = tokenized.labels[tokenized.span(index)].tolist()
        start = next(place for place, label in enumerate(labels) if label != IGNORED)
        asked = Conversation(turns=conversation(question, a("x")).turns[:1], where="")
        assert tokenized.tokens[tokenized.span(index)][:start].tolist() == encode_prompt(asked, tokenizer, wording)


ENDS = {
    "chatml": (["<|im_end|>"], ""), "smollm2": (["<|im_end|>"], ""), "llama2": (["</s>"], ""),
    "llama3": (["<|eot_id|>"], ""), "mistral": (["</s>"], ""), "gemma": (["<end_of_turn>"], ""),
    "phi3": (["<|end|>"], ""), "vicuna": (["</s>"], ""), "qwen3": (["<|im_end|>"], ""), "r1": (["<|end|>"], ""),
    "glm4": (["<|endoftext|>"], "<|user|>"), "qwen3-thinking": (["<|im_end|>"], ""), "harmony": (["<|return|>"], ""),
}  # fmt: skip


@pytest.mark.parametrize("family", ENDS)
def test_the_token_that_ends_an_answer_is_found_and_told(family: str) -> None:
    tokenizer = family_tokenizer(family)
    summary = trained(tokenizer, conversation(*ONE), conversation(*TWO)).summary
    assert summary.wording is not None
    assert (tokenizer.convert_ids_to_tokens(list(summary.wording.ends)), summary.wording.end_text) == ENDS[family]
    told = [note for note in summary.notes if note.startswith("answers end with")]
    marks, eos = ENDS[family][0], tokenizer.eos_token
    assert told == ([] if eos in marks else [f"answers end with {marks[0]}, the tokenizer's eos is {eos}"])


def with_template(template: str, name: str = "chatml") -> Any:
    tokenizer = family_tokenizer(name)
    tokenizer.chat_template = template
    return tokenizer


def before_each(tokenized: TokenizedSet) -> list[list[int]]:
    """The tokens before each learned stretch."""
    found = []
    for index in range(len(tokenized)):
        span = tokenized.span(index)
        labels = tokenized.labels[span].tolist()
        begins = [at for at, label in enumerate(labels) if label != IGNORED and (at == 0 or labels[at - 1] == IGNORED)]
        found += [tokenized.tokens[span][:at].tolist() for at in begins]
    return found


def require_prompts_alike(tokenizer: Any, *found: Conversation) -> TokenizedSet:
    """Every learned answer stands behind the tokens that a model is given when it is asked for it."""
    tokenized = trained(tokenizer, *found)
    wording = tokenized.summary.wording
    assert wording is not None
    prompts = [
        encode_prompt(replace(own, turns=own.turns[:at]), tokenizer, wording)
        for own in found
        for at, turn in enumerate(own.turns)
        if turn.learn
    ]
    assert before_each(tokenized) == prompts
    return tokenized


ODD = (
    "a", "n", "k", ">", "think", "final", "im_end", "user", "q", "\n b", " \t\r\nb\r\n", "\u00a0b\u3000", "b\u2028c",
    "b\0c", "e\u0301a\u0308", "\u200b", "b b b b", "{{ messages }}", "### x\n###\n", "<think>",
)  # fmt: skip


@pytest.mark.parametrize("swallowing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_an_answer_says_is_learned_behind_its_prompt(family: str, swallowing: bool) -> None:
    tokenizer = family_tokenizer(family, swallowing=swallowing)
    for text in ODD:
        tokenized = require_prompts_alike(tokenizer, conversation(u("q"), a(text), u(text), a("A meal."), u("again")))
        assert tokenized.summary.wording is not None
        ends = tokenizer.decode(tokenized.summary.wording.ends)
        first = "|".join(learned(tokenized, tokenizer)).rpartition("A meal.")[0].rstrip("| ")
        for end in (tokenizer.eos_token, ends):
            first = first.removesuffix(end).strip()
        assert first == text.strip()


def test_an_answer_within_what_stands_around_it_is_not_mistaken_for_it() -> None:
    """The first 'c' behind this header is that of '<|channel|>'."""
    tokenizer = family_tokenizer("harmony")
    assert learned(require_prompts_alike(tokenizer, conversation(u("q"), a("c"))), tokenizer) == ["c<|return|>"]
    tokenizer = family_tokenizer("qwen3")
    assert learned(require_prompts_alike(tokenizer, conversation(u("q"), a("think"))), tokenizer) == ["think<|im_end|>"]


def test_a_system_message_that_a_template_writes_before_the_last_question_alone_is_kept() -> None:
    """As Mistral's: once the answer stands there, the question is the last turn no more."""
    tokenizer = family_tokenizer("mistral")
    tokenized = require_prompts_alike(tokenizer, conversation(*TWO, system="Be brief."))
    assert learned(tokenized, tokenizer) == [" b</s>", " d e</s>"]
    whole = [tokenizer.decode(tokenized.tokens[tokenized.span(index)].tolist()) for index in (0, 1)]
    assert whole == [
        "<s>[INST] Be brief.\n\nq[/INST] b</s>", "<s>[INST] q[/INST] b</s>[INST] Be brief.\n\nagain[/INST] d e</s>"
    ]  # fmt: skip


def test_a_template_that_always_asks_for_one_more_answer_does_not_teach_to_ask() -> None:
    template = FAMILIES["chatml"].template.replace("{% if add_generation_prompt %}", "{% if true %}")
    tokenizer = with_template(template)
    assert learned(require_prompts_alike(tokenizer, conversation(*ONE)), tokenizer) == ["A meal.<|im_end|>"]


def test_each_prompt_is_tokenized_as_it_is_asked_where_a_token_would_span_header_and_answer() -> None:
    r"""Alone, the header ends with the token '\n\n'; before a letter, this tokenizer makes two of it."""
    tokenizer = family_tokenizer("llama3")
    tokenized = require_prompts_alike(tokenizer, conversation(*TWO))
    assert learned(tokenized, tokenizer) == ["b<|eot_id|>", "d e<|eot_id|>"]
    assert any("1 of 1 records give a sample for each answer" in note for note in tokenized.summary.notes)


def test_a_header_that_ends_with_a_space_is_learned_from_by_tokenizers_that_write_spaces_before_words() -> None:
    tokenizer = pieces_tokenizer(
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenized = require_prompts_alike(tokenizer, conversation(u("a"), a("b")))
    assert [tokenizer.convert_ids_to_tokens(token) for token in tokenized.tokens.tolist()[-3:]] == [
        "\u2581",
        "b",
        "</s>",
    ]


def test_the_token_that_ends_an_answer_is_the_one_that_is_learned() -> None:
    """Alone, '###' would begin with a space in this tokenizer, and generation would never stop."""
    tokenizer = pieces_tokenizer(
        "{% for m in messages %}{{ m.role + '\n' + m.content + '\n###\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    tokenized = require_prompts_alike(tokenizer, conversation(u("a"), a("b")))
    assert tokenized.summary.wording is not None
    assert tokenizer.convert_ids_to_tokens(list(tokenized.summary.wording.ends)) == ["###"]
    assert tokenized.labels[tokenized.labels != IGNORED][-1] == tokenized.summary.wording.ends[0]


@pytest.mark.parametrize("text", ["<think>\nThe cat.\n</think>", "<think>\nb\n</think>\n\nb"])
@pytest.mark.parametrize("family", ["r1", "qwen3", "qwen3-thinking"])
def test_a_thought_without_an_answer_and_one_that_is_the_answer_are_learned_once(family: str, text: str) -> None:
    tokenizer = family_tokenizer(family)
    (found,) = learned(require_prompts_alike(tokenizer, conversation(u("q"), a(text))), tokenizer)
    opened = "<think>\n" if family == "qwen3-thinking" else ""
    assert (opened + found).removesuffix(tokenizer.eos_token).rstrip() == text


def test_a_turn_behind_the_last_answer_is_not_said_to_be_left_out() -> None:
    tokenizer = family_tokenizer("qwen3")
    summary = trained(tokenizer, conversation(*ONE, u("again"))).summary
    assert not any("leaves out turns" in note for note in summary.notes)


def test_half_an_end_that_the_answer_holds_already_is_written_once() -> None:
    """Phi-3's answers end with '<|end|>' and, behind the last, the end of the text."""
    tokenizer = family_tokenizer("phi3")
    tokenized = trained(tokenizer, conversation(u("q"), a("A meal.<|end|>")))
    assert learned(tokenized, tokenizer) == ["A meal.<|end|>\n<|endoftext|>"]


def test_a_long_answer_that_a_template_changes_is_refused_as_fast_as_a_short_one() -> None:
    text = "a cat eats " * 20_000
    with pytest.raises(DataError, match="leaves out 219,99"):
        trained(with_template(CHANGING.replace("upper", "replace('c', 'C')")), conversation(u("q"), a(text)))


@pytest.mark.parametrize(
    ("end", "text"), [("[THE END]\n", "[THE END]"), (" ### done ###", "### done ###"), ("<|im_end|>\n", "")]
)
def test_an_end_of_turn_of_several_tokens_is_kept_as_text(end: str, text: str) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content + '" + end.replace("\n", "\\n") + "' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    tokenizer = with_template(template)
    summary = trained(tokenizer, conversation(*ONE)).summary
    assert summary.wording is not None
    assert summary.wording.end_text == text
    assert any(repr(text) in note and "stop string" in note for note in summary.notes) == bool(text)


LEAVING_OUT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[:6] if m.role == 'assistant' else m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DOUBLING = LEAVING_OUT.replace("m.content[:6]", "(m.content + ' ' + m.content)")
CHANGING = LEAVING_OUT.replace("m.content[:6]", "(m.content | upper)")
ASKING = LEAVING_OUT.replace("m.content[:6]", "m.content").replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant says\n{% endif %}"
)
BROKEN = "{{ messages[0].content.nothing() }}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LEAVING_OUT, "leaves out 1 characters of turn 2, '.'"),
        (DOUBLING, "writes turn 2 twice"),
        (CHANGING, "characters of turn 2"),
        (ASKING, "asks for turn 2 by ' says"),
        (BROKEN, "refuses it: "),
    ],
)
def test_a_template_that_does_not_write_what_the_record_said_is_refused(template: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        trained(with_template(template), conversation(*ONE))
    assert caught.value.message.startswith("d.jsonl:1: the tokenizer's chat template")
    assert said in caught.value.message
    assert caught.value.try_


def test_reasoning_that_a_template_drops_is_learned_and_told() -> None:
    tokenizer = family_tokenizer("r1")
    tokenized = trained(tokenizer, conversation(*THOUGHT), conversation(*ONE))
    assert "the chat template leaves out the reasoning of 1 answer, which is learned as the records have it" in (
        tokenized.summary.notes
    )


def test_reasoning_in_earlier_answers_is_context_as_generation_would_see_it() -> None:
    tokenizer = family_tokenizer("r1")
    tokenized = trained(tokenizer, conversation(*THOUGHT, u("again"), a("d")))
    assert learned(tokenized, tokenizer) == ["<think>\nThe cat.\n</think>\n\nA meal.<|end|>", "d<|end|>"]
    second = tokenizer.decode(tokenized.tokens[tokenized.span(1)].tolist())
    assert "The cat." not in second
    assert "A meal.<|end|><|User|>again<|Assistant|>d<|end|>" in second


def test_an_opened_thought_is_not_opened_twice() -> None:
    opening = "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
    tokenizer = family_tokenizer("r1")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}", opening
    )
    tokenized = trained(tokenizer, conversation(*THOUGHT))
    assert learned(tokenized, tokenizer) == ["The cat.\n</think>\n\nA meal.<|end|>"]
    assert tokenizer.decode(tokenized.tokens.tolist()).count("<think>") == 1
    with pytest.raises(DataError, match="asks for turn 2 by '<think>"):
        trained(tokenizer, conversation(*ONE))


def test_an_empty_thought_is_given_and_never_learned() -> None:
    tokenizer = family_tokenizer("qwen3")
    summary = trained(tokenizer, conversation(*ONE), conversation(*TWO)).summary
    assert summary.wording is not None
    assert summary.wording.lead == "<think>\n\n</think>\n\n"
    assert "'<think>\\n\\n</think>\\n\\n' stands before 3 answers: it is given, not learned" in summary.notes
    assert any("1 of 2 records give a sample for each answer" in note for note in summary.notes)
    question = Conversation(turns=conversation(*ONE).turns[:1], where="")
    prompt = tokenizer.decode(encode_prompt(question, tokenizer, summary.wording))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(("family", "role"), [("vicuna", "system")])
def test_turns_that_a_template_leaves_out_are_told(family: str, role: str) -> None:
    tokenizer = family_tokenizer(family)
    summary = trained(tokenizer, conversation(*ONE, system="Be brief."), conversation(*ONE)).summary
    assert f"the chat template leaves out turns of the {role}'s: in 1 of 2 records" in summary.notes


def test_a_token_over_header_and_answer_is_never_learned() -> None:
    """'\\n\\n' is one token of this tokenizer; the header ends with one newline, the answer begins with another."""
    tokenizer = family_tokenizer("chatml")
    (pair,) = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    tokenized = trained(tokenizer, conversation(u("q"), a("\nA meal.")))
    assert learned(tokenized, tokenizer) == ["\nA meal.<|im_end|>"]
    assert pair not in tokenized.tokens.tolist()
    start = tokenized.labels.tolist().index(tokenized.labels[tokenized.labels != IGNORED][0].item())
    header = tokenizer("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    assert tokenized.tokens[:start].tolist() == header


@pytest.mark.parametrize("family", ["chatml", "llama3", "llama2"])
def test_an_end_that_the_answer_holds_already_is_written_once(family: str) -> None:
    tokenizer = family_tokenizer(family)
    mark = ENDS[family][0][0]
    tokenized = trained(tokenizer, conversation(u("q"), a(f"A meal.{mark}")))
    assert (
        learned(tokenized, tokenizer)[0].strip()
        == learned(trained(tokenizer, conversation(*ONE)), tokenizer)[0].strip()
    )
    assert "1 answer held the end of the turn already: it is written once" in tokenized.summary.notes


def test_raw_text_with_its_own_begin_and_end_gets_no_second_ones() -> None:
    from tests.runtime.data.test_tokenized import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    found = conversations({"text": "<s>hello there</s>"}, where="d.jsonl:1")
    tokenized = trained(tokenizer, *found)
    assert tokenizer.decode(tokenized.tokens.tolist()) == "<s>hello there</s>"
    assert (tokenized.tokens == tokenizer.bos_token_id).sum() == (tokenized.tokens == tokenizer.eos_token_id).sum() == 1


def test_templates_with_names_and_no_default_are_refused_with_their_names() -> None:
    tokenizer = family_tokenizer("chatml")
    tokenizer.chat_template = {"chat": tokenizer.chat_template, "rag": tokenizer.chat_template}
    with pytest.raises(ModelError, match="chat templates called chat, rag, and none called default"):
        require_template(tokenizer)
    tokenizer.chat_template = {"default": family_tokenizer("chatml").chat_template, "tool_use": "x"}
    require_template(tokenizer)
    assert learned(trained(tokenizer, conversation(*ONE)), tokenizer) == ["A meal.<|im_end|>"]


def test_a_prompt_that_a_template_refuses_is_an_error_with_its_place() -> None:
    found = Conversation(turns=conversation(*ONE, system="Be brief.").turns[:2], where="p.jsonl:7")
    with pytest.raises(DataError, match=r"p\.jsonl:7: the tokenizer's chat template refuses it: System role not supp"):
        prompt_text(found, family_tokenizer("gemma"))


def test_all_records_that_cannot_be_used_are_counted_and_three_are_named() -> None:
    bad: list[Conversation | DataError] = [
        conversations({"messages": [*ONE], "system": "s"}, where=f"d.jsonl:{number}")[0] for number in range(1, 8)
    ]
    good = conversation(*ONE)
    with pytest.raises(DataError) as caught:
        tokenize(
            [*bad, good, DataError("d.jsonl:9: invalid JSON")],
            family_tokenizer("gemma"),
            SampleRules(seq_len=64),
        )
    lines = caught.value.message.split("\n  ")
    assert lines[0] == "8 of 9 records cannot be used"
    assert [line.partition(": ")[0] for line in lines[1:4]] == ["d.jsonl:1", "d.jsonl:2", "d.jsonl:3"]
    assert lines[4:] == ["and 5 more"]


def test_learning_everything_never_learns_what_is_marked_not_to_be() -> None:
    with pytest.raises(DataError, match="an answer is marked as not to be learned"):
        tokenize([conversation(*MARKED)], family_tokenizer("chatml"), SampleRules(seq_len=64, train_on_source=True))
    with pytest.raises(DataError, match="each is a sample of its own"):
        tokenize([conversation(*TWO)], family_tokenizer("qwen3"), SampleRules(seq_len=64, train_on_source=True))


def test_a_token_that_the_model_has_no_row_for_is_refused() -> None:
    tokenizer = family_tokenizer("chatml")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    rules = SampleRules(seq_len=64, rows=len(tokenizer) - 1)
    with pytest.raises(DataError, match=r"d\.jsonl:1: '<pad>' is token \d+, and the model has \d+ rows"):
        tokenize([conversation(u("q"), a("A <pad> meal"))], tokenizer, rules)


def test_with_pad_as_end_of_text_the_end_is_learned() -> None:
    tokenizer = family_tokenizer("llama2")
    tokenizer.pad_token = tokenizer.eos_token
    tokenized = trained(tokenizer, conversation(*ONE))
    assert tokenized.labels[-1] == tokenizer.eos_token_id


def test_what_the_records_were_is_kept_with_the_set() -> None:
    tokenizer = family_tokenizer("chatml")
    transcript = conversations({"text": "### Human: a### Assistant: b### Human: c### Assistant: d"}, where="d.jsonl:1")
    wording = trained(tokenizer, *transcript).summary.wording
    assert wording is not None
    assert (str(wording), wording.gap, wording.end_text) == ("text, raw text", "", "### Human:")
    question = Conversation(turns=conversation(u("hi"), a("x")).turns[:1], where="")
    assert tokenizer.decode(encode_prompt(question, tokenizer, wording)) == "### Human: hi### Assistant:"
    mixed = trained(tokenizer, conversation(*ONE), conversation(*ONE), *transcript).summary
    assert str(mixed.wording) == "messages, text, chat template"
    assert any(note.startswith("records are worded in several ways") for note in mixed.notes)
