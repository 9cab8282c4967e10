"""A conversation keeps what was said, prints answers as they come, and ends them where the run learned to."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qdist.core.data.conversation import Turn, Wording
from qdist.runtime.infer import chat
from qdist.runtime.infer.chat import _exchange, _Printer
from qdist.runtime.infer.decoding import text_of
from qdist.runtime.infer.prompts import Speech
from tests.runtime.data.test_tokenized import CHATML, tiny_tokenizer
from tests.runtime.tiny import tiny_model

ASKED = (Turn("user", "hello", False),)


def speech_of(template: str | None = CHATML, *, end_text: str = "", positions: int | None = 128) -> Speech:
    tokenizer = tiny_tokenizer(template, bos=False)
    tokenizer.pad_token = "<s>"
    style = "chat" if template else "headings"
    return Speech(tokenizer, Wording(style=style, ends=(3,), end_text=end_text), positions)


def printed(speech: Speech, text: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """All that was printed of an answer, and what was printed after each token."""
    printer, seen = _Printer(speech), list[str]()
    printer.put(torch.tensor([[5, 6, 7]]))
    for token in speech.tokenizer(text, add_special_tokens=False)["input_ids"]:
        printer.put(torch.tensor([token]))
        seen.append(capsys.readouterr().out)
    printer.end()
    return "".join(seen) + capsys.readouterr().out, seen


def test_an_answer_is_printed_token_by_token_without_marks(capsys: pytest.CaptureFixture[str]) -> None:
    whole, seen = printed(speech_of(), "hello there<|im_end|>", capsys)
    assert whole == "hello there\n"
    assert sum(bool(text) for text in seen) > 1


def test_an_end_that_is_a_token_as_any_other_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    speech = speech_of()
    ends = (speech.tokenizer.convert_tokens_to_ids("\u0120there"),)
    assert printed(speech._replace(wording=Wording(style="chat", ends=ends)), "hello there", capsys)[0] == "hello\n"


def test_bytes_that_are_no_text_are_told_and_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exchange(None, speech_of(), (Turn("user", "gr\udcfcn", False),), 4) == ()
    assert "half of a character" in capsys.readouterr().out


def test_spaces_before_points_stay_where_the_model_wrote_them() -> None:
    core = Tokenizer(models.WordLevel({"code": 0, ".": 1, "end": 2}, unk_token="."))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    build: Any = PreTrainedTokenizerFast
    tokenizer = build(tokenizer_object=core, clean_up_tokenization_spaces=True)
    assert (tokenizer.decode([0, 1, 2]), text_of(tokenizer, [0, 1, 2])) == ("code. end", "code . end")


def test_half_a_character_waits_for_the_other_half(capsys: pytest.CaptureFixture[str]) -> None:
    whole, seen = printed(speech_of(), "a 🦜 b", capsys)
    assert whole == "a 🦜 b\n"
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in seen)


def test_the_text_that_ends_an_answer_is_not_printed_even_in_part(capsys: pytest.CaptureFixture[str]) -> None:
    speech = speech_of(None, end_text="### Human:")
    assert printed(speech, "one ## two\n### Human: never", capsys)[0] == "one ## two\n\n"
    assert printed(speech, "one ### Hum", capsys)[0] == "one ### Hum\n"


def test_ctrl_c_ends_the_answer_and_keeps_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speech = speech_of()

    def interrupted(_: Any, tokenizer: Any, prompts: Any, *, streamer: Any, **__: Any) -> None:
        streamer.put(torch.tensor(prompts))
        for token in tokenizer("hello th", add_special_tokens=False)["input_ids"]:
            streamer.put(torch.tensor([token]))
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "complete", interrupted)
    turns = _exchange(tiny_model(), speech, ASKED, 20)
    assert [(turn.role, turn.text) for turn in turns] == [("user", "hello"), ("assistant", "hello th")]
    assert capsys.readouterr().out == "hello th\n"


def test_a_conversation_longer_than_the_model_says_so_and_stays(capsys: pytest.CaptureFixture[str]) -> None:
    turns = _exchange(tiny_model(), speech_of(positions=8), ASKED, 20)
    assert turns == ()
    assert "the conversation has" in (said := capsys.readouterr().out)
    assert said.endswith("the model has 8 positions for prompt and answer; /new starts over\n")


def test_an_answer_is_part_of_the_next_prompt() -> None:
    speech = speech_of()
    model = tiny_model()
    model.generation_config.eos_token_id = 1
    turns = _exchange(model, speech, ASKED, 4)
    assert [turn.role for turn in turns] == ["user", "assistant"]
    assert turns[1].text
