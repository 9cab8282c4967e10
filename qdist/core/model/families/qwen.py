"""Qwen2, 2.5 and 3: Llama's layer, with biases on queries, keys and values, or with a norm on queries and keys."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, Gguf, decoder_config, read_grouped
from qdist.core.model.shapes import ModelFacts


def _read_qwen2(keys: Keys) -> ModelFacts:
    return read_grouped(keys, bias=True, out_bias=False)


def _read_qwen3(keys: Keys) -> ModelFacts:
    return read_grouped(keys, bias=keys.flag("attention_bias", default=False), head_dim=128, qk_norm=True)


def _refuse_qwen2(facts: ModelFacts) -> str:
    width = facts.shapes[0].heads * facts.shapes[0].head_dim
    if width == facts.hidden:
        return ""
    return f"has heads of {width} in all, and llama.cpp reads Qwen2 with {facts.hidden} like its hidden size"


def _refuse_qwen3(facts: ModelFacts) -> str:
    biased = any(linear.bias for linear in facts.linears)
    return "has attention_bias, and llama.cpp reads Qwen3 without" if biased else ""


def _qwen25(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, *,
    vocab: int = 152_064, positions: int = 131_072, eps: float = 1e-6, tied: bool = False,
) -> Config:  # fmt: skip
    return decoder_config(
        "qwen2", hidden, inner, layers, heads, kv_heads, vocab=vocab, positions=positions, eps=eps,
        theta=1_000_000.0, bos=151_643, eos=151_643, tied=tied,
    )  # fmt: skip


def _qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool = False) -> Config:
    return decoder_config(
        "qwen3", hidden, inner, layers, heads, 8, vocab=151_936, positions=40_960,
        theta=1_000_000.0, bos=151_643, eos=151_645, tied=tied, head_dim=128,
    )  # fmt: skip


_QWEN25: dict[str, Config] = {"instruct": {"max_position_embeddings": 32_768, "eos_token_id": 151_645}}
_QWEN3: dict[str, Config] = {"base": {"max_position_embeddings": 32_768, "eos_token_id": 151_643}}

QWEN2 = Family(
    model_type="qwen2",
    read=_read_qwen2,
    gguf=Gguf("qwen2", refusal=_refuse_qwen2),
    aliases={
        "qwen2.5-0.5b": Alias(
            "Qwen/Qwen2.5-0.5B", _qwen25(896, 4864, 24, 14, 2, vocab=151_936, positions=32_768, tied=True), _QWEN25
        ),
        "qwen2.5-1.5b": Alias("Qwen/Qwen2.5-1.5B", _qwen25(1536, 8960, 28, 12, 2, vocab=151_936, tied=True), _QWEN25),
        "qwen2.5-7b": Alias("Qwen/Qwen2.5-7B", _qwen25(3584, 18_944, 28, 28, 4), _QWEN25),
        "qwen2.5-14b": Alias("Qwen/Qwen2.5-14B", _qwen25(5120, 13_824, 48, 40, 8, eps=1e-5), _QWEN25),
        "qwen2.5-32b": Alias("Qwen/Qwen2.5-32B", _qwen25(5120, 27_648, 64, 40, 8, eps=1e-5), _QWEN25),
        "qwen2.5-72b": Alias("Qwen/Qwen2.5-72B", _qwen25(8192, 29_568, 80, 64, 8, eps=1e-5), _QWEN25),
    },
)
QWEN3 = Family(
    model_type="qwen3",
    read=_read_qwen3,
    gguf=Gguf("qwen3", refusal=_refuse_qwen3),
    aliases={
        "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B", _qwen3(1024, 3072, 28, 16, tied=True), _QWEN3),
        "qwen3-4b": Alias("Qwen/Qwen3-4B", _qwen3(2560, 9728, 36, 32, tied=True), _QWEN3),
        "qwen3-8b": Alias("Qwen/Qwen3-8B", _qwen3(4096, 12_288, 36, 32), _QWEN3),
        "qwen3-14b": Alias("Qwen/Qwen3-14B", _qwen3(5120, 17_408, 40, 40), _QWEN3),
        "qwen3-32b": Alias("Qwen/Qwen3-32B", _qwen3(5120, 25_600, 64, 64)),
    },
)
