"""The text of an answer comes as soon as it is certain, and adds up to what decoding all of it at once gives."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qdist.runtime.infer.decoding import answer_of, as_written, text_of
from qdist.runtime.infer.text import AnswerText
from tests.runtime.data.test_tokenized import CHATML, tiny_tokenizer

HALF = "\N{REPLACEMENT CHARACTER}"


def with_byte_tokens() -> Any:
    """As LLaMA 1's: words with a mark for the space before them, and a token for each byte."""
    vocabulary = {"<unk>": 0, "\u2581hello": 1, "\u2581there": 2, ".": 3}
    vocabulary |= {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=core)


def by_bytes(text: str) -> list[int]:
    return [4 + byte for byte in text.encode()]


def pieces(tokenizer: Any, tokens: list[int], *stops: str) -> tuple[list[str], str]:
    """What each token brought until a stop text was found, and what came at the end."""
    text, found = AnswerText(tokenizer, stops), list[str]()
    for token in tokens:
        found.append(text.add(token))
        if text.stopped:
            break
    return found, text.finish()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize(
    "text", ["", "hello there", " hello 🦜🦜 é\n\n there ", "naïve 日本語", "a<|im_start|>b<|im_end|>"]
)
def test_pieces_add_up_to_the_whole_and_hold_no_half_character(text: str) -> None:
    tokenizer = tiny_tokenizer(CHATML, bos=False)
    tokens = ids_of(tokenizer, text)
    found, rest = pieces(tokenizer, tokens)
    assert "".join(found) == as_written(tokenizer, tokens) == text
    assert rest == ""
    assert not any(HALF in piece for piece in found)


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = with_byte_tokens()
    found, rest = pieces(tokenizer, [1, *by_bytes("é"), *by_bytes("日"), 2, 3])
    assert found == ["hello", "", "é", "", "", "日", " there", "."]
    assert rest == ""


def test_half_a_character_at_the_end_is_told_at_the_end() -> None:
    tokenizer = tiny_tokenizer(bos=False)
    tokens = ids_of(tokenizer, "a🦜")[:-1]
    found, rest = pieces(tokenizer, tokens)
    assert ("".join(found), rest) == ("a", HALF)
    assert as_written(tokenizer, tokens) == "a" + HALF


def test_bytes_that_never_become_a_character_do_not_wait_forever() -> None:
    tokenizer = with_byte_tokens()
    found, rest = pieces(tokenizer, [4 + 0xFF] * 200)
    assert "".join(found) + rest == HALF * 200
    assert sum(map(bool, found)) == 3


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one ## two\n### Human: never", ("### Human:",), "one ## two\n"),
        ("one ### Hum", ("### Human:",), "one ### Hum"),
        ("aab", ("ab",), "a"),
        ("aaab", ("aab", "b"), "a"),
        ("hello there user", ("user", "there"), "hello "),
        ("🦜 x", ("🦜",), ""),
        ("x", ("", ""), "x"),
    ],
)
def test_an_answer_ends_before_the_first_stop_text(text: str, stops: tuple[str, ...], wanted: str) -> None:
    tokenizer = tiny_tokenizer(bos=False)
    found, rest = pieces(tokenizer, ids_of(tokenizer, text), *stops)
    assert "".join(found) + rest == wanted
    told = ""
    for piece in found:
        told += piece
        assert wanted.startswith(told), "nothing of a stop text is ever told"


def test_what_may_begin_a_stop_text_is_held_back_no_longer_than_it_may() -> None:
    tokenizer = with_byte_tokens()
    assert pieces(tokenizer, by_bytes("a##b##"), "###") == (["a", "", "", "##b", "", ""], "##")


def test_answers_are_those_of_the_commands() -> None:
    class Model:
        class generation_config:
            eos_token_id = 3

    tokenizer = tiny_tokenizer(CHATML, bos=False)
    for text in ("hello there### Human: you", " hello there", "🦜 hello### Human:"):
        tokens = ids_of(tokenizer, text)
        found, rest = pieces(tokenizer, tokens, "### Human:")
        assert ("".join(found) + rest).strip() == text_of(
            tokenizer, answer_of(Model, tokenizer, tokens, ("### Human:",))
        )
