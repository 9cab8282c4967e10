import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from qdist.core.errors import ModelError
from qdist.runtime.exports.gguf.file import write_gguf
from qdist.runtime.exports.gguf.tokenizer import Vocabulary, add_vocabulary, pre_of, read_vocabulary
from tests.runtime.data.test_tokenized import CHATML, tiny_tokenizer
from tests.runtime.gguf_models import config_of, fields, tensors_of
from tests.runtime.tiny import tiny_model

TEXTS = (
    "", " ", "a", "hello there", "hello  there\n\n\tsystem 1234 67,890.5", "  leading, trailing  ",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \u043c\u0438\u0440 \U0001f99c", "I'm you'RE 's 'S don't",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "<s>hello</s>there",
)  # fmt: skip
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRAINED_ON = ["hello there assistant user system Human", "the quick brown fox 12", "hello then, the other"] * 20


def split(regex: str, **more: Any) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(regex), "isolated", **more),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def bytewise(*steps: Any, special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")) -> Any:
    """A byte-level tokenizer that cuts text in the given steps."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    core.train_from_iterator(TRAINED_ON, trainer)
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=core, eos_token=special[-1], pad_token=special[0])


def qwen() -> Any:
    tokenizer = bytewise(*split(PRETOKENIZE_REGEX))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece(folder: Path, *, bos: bool = True) -> Path:
    """A folder as Llama 2's was, with nothing but tokenizer.model."""
    import sentencepiece as spm

    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINED_ON), model_writer=model, model_type="bpe", vocab_size=330, byte_fallback=True,
        character_coverage=1.0, remove_extra_whitespaces=False, normalization_rule_name="identity", split_digits=True,
        hard_vocab_limit=False, minloglevel=2, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    said = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": bos, "bos_token": "<s>", "eos_token": "</s>",
            "unk_token": "<unk>", "legacy": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def vocabulary_of(tokenizer: Any, folder: Path, *, rows: int = 330, **config: Any) -> Vocabulary:
    return read_vocabulary(saved(tokenizer, folder), rows=rows, config=config)


def exported(family: str, folder: Path, *, rows: int = 330, **changes: Any) -> Path:
    """A whole model with the tokenizer of a folder, in a folder where no reader finds the tokenizer's own files."""
    own = {"head_dim": 128, "num_key_value_heads": 2} if family == "qwen3" else {"head_dim": 16}
    model = tiny_model(family, vocab_size=rows, **{**own, **changes})
    out = folder / "written" / "model.gguf"
    out.parent.mkdir()
    write_gguf(out, tensors_of(model), config=config_of(model), tokenizer=folder, name="tiny", kind="f16")
    return out


def same_tokens(tokenizer: Any, other: Any) -> None:
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert other(text, add_special_tokens=False)["input_ids"] == ids, text
        assert other.decode(ids) == tokenizer.decode(ids), text


# Read back through transformers


@pytest.mark.parametrize(("family", "make"), [("llama", tiny_tokenizer), ("qwen2", qwen), ("qwen3", qwen)])
def test_bytewise_tokenizers_read_back_give_the_same_tokens(
    family: str, make: Callable[[], Any], tmp_path: Path
) -> None:
    tokenizer = make()
    tokenizer.chat_template = CHATML
    grouped = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    out = exported(family, saved(tokenizer, tmp_path), **grouped)
    other = AutoTokenizer.from_pretrained(str(out.parent), gguf_file=out.name)
    same_tokens(tokenizer, other)
    assert other.chat_template == CHATML
    turns = [{"role": "user", "content": "hello there"}]
    assert other.apply_chat_template(turns, tokenize=False) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_sentencepiece_tokenizer_read_back_gives_the_same_tokens(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(sentencepiece(tmp_path)))
    out = exported("llama", tmp_path)
    other = AutoTokenizer.from_pretrained(str(out.parent), gguf_file=out.name)
    for text in TEXTS:
        if not text.startswith(" ") and "<s>" not in text:  # transformers' two readers put the first space differently
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert other(text, add_special_tokens=False)["input_ids"] == ids, text
            assert other.decode(ids).strip() == text.strip()


# What is written


def test_types_special_tokens_and_rows_without_a_token(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("plain_word", special=False)])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    found = vocabulary_of(tokenizer, tmp_path, rows=len(tokenizer) + 3)
    types = dict(zip(found.tokens, found.types, strict=True))
    assert (found.model, found.pre, found.notes) == ("gpt2", "gpt-2", ())
    assert types["<s>"] == types["<|im_end|>"] == types["<pad>"] == gguf.TokenType.CONTROL
    assert types["plain_word"] == gguf.TokenType.USER_DEFINED
    assert types["a"] == gguf.TokenType.NORMAL
    assert found.tokens[-1] == f"[PAD{len(tokenizer) + 2}]"
    assert found.types[-3:] == (gguf.TokenType.UNUSED,) * 3
    assert found.ids == {"bos": 0, "eos": 1, "pad": tokenizer.pad_token_id}
    assert [found.tokens[place] for place in range(len(tokenizer))] == tokenizer.convert_ids_to_tokens(
        list(range(len(tokenizer)))
    )


@pytest.mark.parametrize("bos", [True, False])
def test_what_is_put_around_a_text_is_found_out(bos: bool, tmp_path: Path) -> None:
    assert vocabulary_of(tiny_tokenizer(bos=bos), tmp_path).add_bos == bos
    ends = tiny_tokenizer()
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    found = vocabulary_of(ends, tmp_path)
    assert (found.add_bos, found.add_eos) == (True, True)


@pytest.mark.parametrize("bos", [True, False])
def test_sentencepiece_has_scores_and_byte_tokens(bos: bool, tmp_path: Path) -> None:
    import sentencepiece as spm

    found = read_vocabulary(sentencepiece(tmp_path, bos=bos), rows=340, config={"eos_token_id": [2, 5]})
    own = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (found.model, found.pre, found.add_space, found.add_bos) == ("llama", "default", True, bos)
    assert found.ids == {"bos": 1, "eos": 2, "unk": 0}
    (note,) = found.notes
    assert "behind a special token llama.cpp puts a space" in note
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    assert list(found.types[:259]) == kinds
    pieces = [own.id_to_piece(place) for place in range(own.get_piece_size())]
    assert list(found.tokens[: len(pieces)]) == pieces
    merged = [place for place in range(259, len(pieces)) if len(pieces[place]) > 1]
    by_score = sorted(merged, key=lambda place: -own.get_score(place))
    assert sorted(merged, key=lambda place: -found.scores[place]) == by_score
    assert all(found.scores[place] < min(found.scores[other] for other in merged) for place in (0, 1, 2, 3, 258))


@pytest.mark.parametrize(("scheme", "notes"), [("first", 1), ("always", 0), ("never", 0)])
def test_where_llama_cpp_puts_other_spaces_is_told(scheme: Any, notes: int, tmp_path: Path) -> None:
    core = AutoTokenizer.from_pretrained(str(sentencepiece(tmp_path / "own"))).backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    build: Any = PreTrainedTokenizerFast
    found = vocabulary_of(build(tokenizer_object=core, eos_token="</s>", unk_token="<unk>"), tmp_path / scheme)
    assert found.model == "llama"
    assert found.add_space == (scheme != "never")
    assert len(found.notes) == notes


def test_the_keys_of_a_file(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("{{ messages }}")
    out = exported("llama", saved(tokenizer, tmp_path))
    found = fields(out)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.bos_token_id"] == 0
    assert found["tokenizer.ggml.eos_token_id"] == 1
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 330


def test_several_chat_templates_are_kept(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    found = vocabulary_of(tokenizer, tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "keys.gguf", "llama")
    add_vocabulary(writer, found)
    keys = writer.kv_data[0]
    assert keys["tokenizer.chat_template"].value == "{{ messages }}"
    assert keys["tokenizer.chat_template.tool_use"].value == "{{ tools }}"


def test_an_eos_that_is_not_the_model_s_is_told(tmp_path: Path) -> None:
    (note,) = vocabulary_of(tiny_tokenizer(), tmp_path, eos_token_id=[3, 2]).notes
    assert note == "eos is </s> (1) as the tokenizer says; the configuration says 3, 2"
    (note,) = vocabulary_of(tiny_tokenizer(eos=None), tmp_path / "none", eos_token_id=1).notes
    assert note == "eos is none as the tokenizer says; the configuration says 1"


# How text is cut


@pytest.mark.parametrize(
    ("steps", "whole_words", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], False, "gpt-2"),
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], False, "smollm"),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "smaug-bpe"),
        (split(PRETOKENIZE_REGEX), False, "qwen2"),
        (split(TEKKEN), True, "tekken"),
        (split(TEKKEN), False, None),
        (split(r"\s+"), False, None),
        (split(PRETOKENIZE_REGEX, invert=True), False, None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], False, None),
        ([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)], False, None),
    ],
)
def test_the_way_text_is_cut_is_known_by_its_rules(steps: list[Any], whole_words: bool, name: str | None) -> None:
    core = Tokenizer(models.BPE(ignore_merges=whole_words))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    found, notes = pre_of(json.loads(core.to_str()))
    assert found == name
    assert bool(notes) == (name is None)


def test_normalizing_is_told() -> None:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    name, (note,) = pre_of(json.loads(core.to_str()))
    assert name == "gpt-2"
    assert "does not normalize text (Lowercase)" in note


# What is refused


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokens up to \d+, and the embedding has 100 rows"):
        vocabulary_of(tiny_tokenizer(), tmp_path, rows=100)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (models.WordLevel({"a": 0}, unk_token="a"), "has a WordLevel tokenizer"),
        (models.BPE(), "works neither on bytes"),
    ],
)
def test_other_tokenizers_are_refused(model: Any, said: str, tmp_path: Path) -> None:
    build: Any = PreTrainedTokenizerFast
    with pytest.raises(ModelError, match=said):
        vocabulary_of(build(tokenizer_object=Tokenizer(model)), tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer"):
        read_vocabulary(tmp_path, rows=10, config={})
