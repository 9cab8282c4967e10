"""A template that is named takes the place of the tokenizer's own, in training, in prompts, and in what is saved."""

from pathlib import Path
from typing import Any

import pytest

from qdist.core.data.conversation import Conversation, Turn, Wording
from qdist.core.data.reading import Reading
from qdist.core.data.templates import TEMPLATES, NamedTemplate
from qdist.core.errors import DataError, ModelError, SpecError
from qdist.core.spec.sections import Data
from qdist.host.data.chat_templates import find_template
from qdist.runtime.data.token_cache import cache_key
from qdist.runtime.data.tokenizing import SampleRules
from qdist.runtime.data.wording import encode_prompt, give_template, require_worded
from tests.runtime.data.test_chat_template import learned, trained
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.data.test_tool_templates import HERMES, TALKS, a, said, u
from tests.runtime.family_templates import family_tokenizer


def given(name: str, family: str = "llama2") -> tuple[Any, tuple[str, ...]]:
    tokenizer = family_tokenizer(family)
    tokenizer.chat_template = None
    return tokenizer, give_template(tokenizer, TEMPLATES[name])


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_learned_up_to_an_end_that_is_a_token(name: str) -> None:
    """Whatever the vocabulary: here that of Llama 2, with no token of other templates."""
    tokenizer, _ = given(name)
    found = said(Turn("system", "Be brief.", False), u("q"), a("b"), u("r"), a("d"))
    texts = learned(trained(tokenizer, found), tokenizer)
    summary = trained(tokenizer, found).summary
    assert [text.strip() for text in "|".join(texts).split("|")] in (["b</s>", "d</s>"], ["b </s>", "d </s>"])
    assert summary.wording is not None
    assert (summary.wording.style, summary.wording.ends) == ("chat", (tokenizer.eos_token_id,))
    assert summary.wording.end_text == ""


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_what_answers_stand_behind(name: str) -> None:
    tokenizer, _ = given(name)
    tokenized = trained(tokenizer, said(u("q"), a("b")))
    wording = tokenized.summary.wording
    assert wording is not None
    prompt = encode_prompt(said(u("q")), tokenizer, wording)
    assert tokenized.tokens.tolist()[: len(prompt)] == prompt
    assert tokenizer.decode(tokenized.tokens.tolist()[len(prompt) :]).strip() in ("b</s>", "b </s>")


def test_a_template_ends_turns_with_its_own_token_where_there_is_one() -> None:
    tokenizer, notes = given("chatml", "qwen3")
    assert learned(trained(tokenizer, said(u("q"), a("b"))), tokenizer) == ["b<|im_end|>"]
    assert notes == ("chat template chatml: it is saved with the adapter",)
    tokenizer, notes = given("chatml")
    assert learned(trained(tokenizer, said(u("q"), a("b"))), tokenizer) == ["b</s>"]
    assert notes[1:] == (
        "<|im_start|>: not tokens of this vocabulary, so they are written as text",
        "turns end with </s>: <|im_end|> is not a token of this vocabulary",
    )


def test_it_takes_the_place_of_the_tokenizers_own() -> None:
    tokenizer = family_tokenizer("llama3")
    (note, *_) = give_template(tokenizer, TEMPLATES["belle"])
    assert note == "chat template belle in place of the tokenizer's own: it is saved with the adapter"
    whole = tokenizer.decode(trained(tokenizer, said(u("q"), a("b"))).tokens.tolist())
    assert whole.endswith("Human: q\n\nAssistant:b<|end_of_text|>")


def test_chatml_by_name_is_the_way_out_for_calls_of_tools() -> None:
    """As what is said to try has it."""
    tokenizer = family_tokenizer("smollm2")
    with pytest.raises(DataError, match="does not write the call") as caught:
        trained(tokenizer, TALKS["tools"])
    assert "data.template=chatml" in caught.value.try_
    give_template(tokenizer, TEMPLATES["chatml"])
    assert learned(trained(tokenizer, TALKS["tools"]), tokenizer) == [f"{HERMES}<|im_end|>|d<|im_end|>"]


def test_an_instructions_input_is_worded_as_alpacas() -> None:
    tokenizer, _ = given("alpaca")
    found = Conversation(turns=(Turn("user", "Add.", False, "1 2"), a("3")), where="")
    whole = tokenizer.decode(trained(tokenizer, found).tokens.tolist())
    assert "paired with an input" in whole
    assert whole.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:3</s>")


def test_a_tokenizer_without_an_end_is_refused_where_the_template_needs_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token, by which vicuna would end an answer"):
        give_template(tokenizer, TEMPLATES["vicuna"])


def test_the_cached_tokens_are_of_one_template(tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_text('{"input": "a", "output": "b"}\n')
    keys = set()
    for name in ("belle", "ziya"):
        tokenizer = given(name)[0]
        data = Data(path=str(source))
        keys.add(cache_key(data, tokenizer, SampleRules(seq_len=16), reading=Reading(), seed=0))
    assert len(keys) == 2


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    found = find_template(str(path))
    assert found == NamedTemplate("own.jinja", path.read_text(), complete=True)
    tokenizer = family_tokenizer("llama2")
    give_template(tokenizer, found)
    assert tokenizer.chat_template == path.read_text()


def test_a_name_that_is_none_is_refused_with_the_nearest() -> None:
    assert find_template("vicuna") == TEMPLATES["vicuna"]
    with pytest.raises(SpecError, match=r"data\.template=vicunna is neither") as caught:
        find_template("vicunna")
    assert caught.value.try_ == "--set data.template=vicuna"
    with pytest.raises(SpecError) as caught:
        find_template("1/2")
    assert "a Jinja file, or one of alpaca, aquila" in caught.value.try_


def test_raw_text_is_worded_by_no_template() -> None:
    raw = Wording(format="text", style="plain", raw=True)
    with pytest.raises(DataError, match=r"data\.template=ziya words conversations, and these records are text, raw"):
        require_worded(raw, TEMPLATES["ziya"])
    require_worded(Wording(style="chat"), TEMPLATES["ziya"])
