"""Is a GGUF file's shape read from its header, and a header that cannot be read refused in a sentence?"""

import struct
from pathlib import Path

import pytest

from qdist.core.errors import ModelError
from qdist.core.model.families import from_config
from qdist.host.sources.gguf_header import parts_of, read_config, read_header
from qdist.host.sources.models import find_shape
from qdist.host.sources.targets import check_model

LLAMA: dict[str, str | int | float | list[str]] = {
    "general.architecture": "llama",
    "general.name": "tiny ä",
    "llama.context_length": 256,
    "llama.block_count": 2,
    "llama.feed_forward_length": 128,
    "llama.embedding_length": 64,
    "llama.rope.dimension_count": 16,
    "llama.rope.freq_base": 10_000.0,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": ["<s>", "a", "b"],
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(found: str | int | float | list[str]) -> bytes:
    if isinstance(found, list):
        return struct.pack("<IIQ", 9, 8, len(found)) + b"".join(map(text, found))
    if isinstance(found, str):
        return struct.pack("<I", 8) + text(found)
    return struct.pack("<If", 6, found) if isinstance(found, float) else struct.pack("<II", 4, found)


def header(keys: dict[str, str | int | float | list[str]], tensors: tuple[str, ...] = ()) -> bytes:
    """A GGUF file without its weights."""
    told = b"".join(text(key) + value(found) for key, found in keys.items())
    named = b"".join(text(name) + struct.pack("<IQQIQ", 2, 64, 3, 0, 0) for name in tensors)
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + told + named


def test_a_header_is_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(header(LLAMA, ("token_embd.weight", "output.weight")) + bytes(64))
    assert read_header(file).tensors == ("token_embd.weight", "output.weight")
    assert read_config(file) == {
        "model_type": "llama", "max_position_embeddings": 256, "num_hidden_layers": 2, "intermediate_size": 128,
        "hidden_size": 64, "head_dim": 16, "rope_theta": 10_000.0, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 3, "tie_word_embeddings": False,
    }  # fmt: skip
    found = find_shape(str(file))
    assert found is not None
    assert found.facts == from_config(read_config(file), name=str(file))


def test_an_output_that_is_not_there_is_tied_and_a_stated_vocabulary_wins(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(header(LLAMA | {"llama.vocab_size": 320}, ("token_embd.weight",)))
    config = read_config(file)
    assert (config["tie_word_embeddings"], config["vocab_size"]) == (True, 320)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with GGUF"),
        (b"PK\x03\x04", "does not begin with GGUF"),
        (b"GGUF", "cut short or damaged"),
        (header(LLAMA)[:-3], "cut short or damaged"),
        (header(LLAMA, ("output.weight",))[:-30], "cut short or damaged"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "cut short or damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**63) + b"x", "cut short or damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 12, 2**62), "architecture 'None'"),
        (header(LLAMA | {"general.architecture": "gemma2"}), "architecture 'gemma2', which qdist does not read"),
        (header({"general.architecture": "llama"}), "has no hidden_size"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        find_shape(str(file))
    assert caught.value.try_


def test_a_model_in_parts_is_planned_from_all_of_them_and_opened_from_none(tmp_path: Path) -> None:
    first, second = (tmp_path / f"tiny-0000{part}-of-00002.gguf" for part in (1, 2))
    first.write_bytes(header(LLAMA, ("token_embd.weight",)))
    with pytest.raises(ModelError, match=r"is the first of 2 parts; tiny-00002-of-00002\.gguf is not beside it"):
        read_config(first)
    second.write_bytes(header({"split.no": 1}, ("output.weight",)))
    assert parts_of(first) == (first, second)
    assert read_config(first)["tie_word_embeddings"] is False
    with pytest.raises(ModelError, match="is part 2 of 2") as caught:
        find_shape(str(second))
    assert caught.value.try_ == str(first)
    with pytest.raises(ModelError, match="is split into 2 files, which transformers does not read"):
        check_model(str(first))
