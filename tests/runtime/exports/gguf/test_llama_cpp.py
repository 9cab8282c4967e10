"""What llama.cpp itself computes from the files that are written, with every token forced, and how it cuts texts."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from qdist.core.model.families import FAMILIES
from qdist.runtime.exports.gguf import export
from qdist.runtime.exports.gguf.file import write_gguf
from qdist.runtime.infer.load import load
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.exports.gguf.read_by_llama_cpp import Asked, read
from tests.runtime.exports.gguf.test_tokenizer import (
    LLAMA3,
    TEKKEN,
    TEXTS,
    bytewise,
    exported,
    qwen,
    saved,
    sentencepiece,
    split,
)
from tests.runtime.exports.test_export_targets import exported as asked_for
from tests.runtime.exports.test_export_targets import qlora_run
from tests.runtime.exports.test_qalora_merge import ASYMMETRIC, run_over
from tests.runtime.gguf_models import KINDS, config_of, model_of, rounded, tensors_of
from tests.runtime.gptq_files import padded, save_gptq

IDS = torch.randint(4, 250, (40,), generator=torch.Generator().manual_seed(0)).tolist()
CLOSE = {"f16": 1e-3, "q8_0": 0.02, "q4_1": 0.1}
"""Kullback-Leibler divergence from transformers, at most: llama.cpp rounds what it multiplies with quantized weights to
8 bits, and tiny models are drawn so wide that this is much."""


def _rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, **settings}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "linear positions": ("llama", _rope(rope_type="linear", factor=4.0)),
    "yarn": ("qwen3", _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama3 positions": ("llama", _rope(rope_type="llama3", **_LLAMA3)),
    "theta": ("qwen2", _rope(rope_type="default", rope_theta=1e6)),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "wide heads": ("mistral", {"head_dim": 32}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "as many keys as queries": ("llama", {"num_key_value_heads": 4}),
    "narrow heads": ("qwen3", {"head_dim": 16}),
}
TINY = (
    *((family, kind, {}) for family, own in FAMILIES.items() if own.gguf for kind in KINDS),
    *((family, "f16", changes) for family, changes in VARIANTS.values()),
)
NAMES = [*(f"{family} {kind}" for family, kind, changes in TINY if not changes), *VARIANTS]


@pytest.fixture(scope="module")
def divergences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Of each tiny model from what transformers computes with the same rounded weights, after each token."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = saved(tiny_tokenizer(), folder / "tokenizer")
    files, models = [], []
    for number, (family, kind, changes) in enumerate(TINY):
        model = model_of(family, **changes)
        tensors, out = tensors_of(model, kind), folder / f"{number}.gguf"
        write_gguf(out, tensors, config=config_of(model), tokenizer=tokenizer, name="tiny", kind=kind)
        files.append(out)
        models.append(rounded(model, kind))
    readings = read(*(Asked(file, ids=IDS) for file in files))
    return {
        name: divergence(reading.logprobs, model) for name, reading, model in zip(NAMES, readings, models, strict=True)
    }


def divergence(logprobs: list[list[float]], model: Any) -> torch.Tensor:
    """Of llama.cpp's distribution from a model's after each token of IDS, over the tokens that the file has."""
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0].float()
    found = torch.tensor(logprobs)
    wanted = torch.log_softmax(logits[:, : found.shape[1]], -1)
    return torch.where(wanted > -30, wanted.exp() * (wanted - found), 0).sum(-1)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kind, _) in zip(NAMES, TINY, strict=True)])
def test_llama_cpp_computes_what_transformers_does(name: str, kind: str, divergences: dict[str, torch.Tensor]) -> None:
    assert float(divergences[name].max()) < CLOSE[kind]


def test_llama_cpp_computes_what_qa_lora_and_a_merged_adapter_learnt(tmp_path: Path) -> None:
    exact = run_over(save_gptq(tmp_path / "gptq", ASYMMETRIC, tokenizer=padded()), tmp_path / "qa")
    merged = qlora_run(tmp_path)
    files = [tmp_path / "q4_1.gguf", tmp_path / "f16.gguf"]
    for run, file in zip((exact, merged), files, strict=True):
        export.run(asked_for(run, file, to="gguf"))
    first, second = read(*(Asked(file, ids=IDS) for file in files))
    assert float(divergence(first.logprobs, load(exact.path, dtype="float32")[0]).max()) < CLOSE["q4_1"]
    assert float(divergence(second.logprobs, load(merged.path, dtype="float32")[0]).max()) < CLOSE["f16"]


def _smollm() -> Any:
    return bytewise(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))


TOKENIZERS: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "gpt-2": ("llama", tiny_tokenizer),
    "qwen2": ("qwen2", qwen),
    "llama-bpe": ("llama", partial(bytewise, *split(LLAMA3))),
    "tekken": ("mistral", partial(bytewise, *split(TEKKEN))),
    "smollm": ("llama", _smollm),
}
ONE_LAYER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}


def test_llama_cpp_cuts_texts_into_the_same_tokens(tmp_path: Path) -> None:
    texts = [text for text in TEXTS if text]
    files = []
    for name, (family, make) in TOKENIZERS.items():
        saved(make(), tmp_path / name)
        files.append(exported(family, tmp_path / name, **ONE_LAYER))
    for (_, make), reading in zip(
        TOKENIZERS.values(), read(*(Asked(file, texts=texts) for file in files)), strict=True
    ):
        assert reading.tokens == [make()(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_llama_cpp_cuts_texts_of_sentencepiece_into_the_same_tokens(tmp_path: Path) -> None:
    """Except before a text's first space and behind special tokens, where transformers puts none."""
    tokenizer = AutoTokenizer.from_pretrained(str(sentencepiece(tmp_path)))
    texts = [text for text in TEXTS if text and not text.startswith(" ") and "<s>" not in text]
    (reading,) = read(Asked(exported("llama", tmp_path, **ONE_LAYER), texts=texts))
    assert reading.tokens == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
