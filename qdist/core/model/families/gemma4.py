"""Gemma 4: two sizes of heads, last layers that read others' keys and values, embeddings a layer, experts."""

from typing import Any

from qdist.core.model.config import Keys
from qdist.core.model.families import towers
from qdist.core.model.families.family import (
    WRAPPED,
    Alias,
    Config,
    Family,
    count_layers,
    read_model,
    read_wrapped,
)
from qdist.core.model.families.layers import NORM, gated_experts, in_runs, mlp_linears, router
from qdist.core.model.shapes import Experts, Kept, LayerShape, Linear, ModelFacts

_FULL, _SLIDING = "full_attention", "sliding_attention"
_DEFAULTS: Config = {
    "model_type": "gemma4_text",
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "max_position_embeddings": 131_072,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
}
"""Those of transformers' class."""


def _kinds(keys: Keys) -> list[str]:
    """What each layer attends to; the last one always to all."""
    count = count_layers(keys)
    pattern = [_SLIDING if (layer + 1) % 6 else _FULL for layer in range(count)]
    return [*keys.texts("layer_types", default=pattern, length=count)[:-1], _FULL]


def _head_shape(keys: Keys, layer: int, kind: str) -> tuple[int, int]:
    """Heads of keys and values of a layer, and their width."""
    kv_heads, head_dim = keys.count("num_key_value_heads"), keys.count("head_dim")
    if keys.states("per_layer_config"):
        own = keys.inner("per_layer_config").inner(str(layer))
        return own.count("num_key_value_heads", default=kv_heads), own.count("head_dim", default=head_dim)
    if kind != _FULL:
        return kv_heads, head_dim
    if keys.flag("attention_k_eq_v", default=False):
        kv_heads = keys.count("num_global_key_value_heads", default=kv_heads)
    return kv_heads, keys.count("global_head_dim")


def _experts(keys: Keys) -> Experts | None:
    if not keys.flag("enable_moe_block", default=False):
        return None
    count, active = keys.count("num_experts"), keys.count("top_k_experts")
    width = keys.count("moe_intermediate_size")
    return gated_experts(keys.count("hidden_size"), width, count=count, active=active, path="experts")


def _attention(keys: Keys, kind: str, kv_heads: int, head_dim: int, *, shared: bool) -> tuple[Linear, ...]:
    """A layer that reads others' keys and values makes none; in some models a key is its value as well."""
    hidden, width = keys.count("hidden_size"), keys.count("num_attention_heads") * head_dim
    bias = keys.flag("attention_bias", default=False)
    one = keys.flag("attention_k_eq_v", default=False) and kind == _FULL
    made = () if shared else (("k_proj",) if one else ("k_proj", "v_proj"))
    return (
        Linear("q_proj", hidden, width, bias, "attention_in"),
        *(Linear(leaf, hidden, kv_heads * head_dim, bias, "attention_in") for leaf in made),
        Linear("o_proj", width, hidden, bias, "attention_out"),
    )


def _layer(keys: Keys, layer: int, kind: str) -> LayerShape:
    hidden, narrow = keys.count("hidden_size"), keys.count("hidden_size_per_layer_input", least=0)
    first = count_layers(keys) - keys.count("num_kv_shared_layers", least=0)
    shared = layer >= first
    kv_heads, head_dim = _head_shape(keys, layer, kind)
    inner = keys.count("intermediate_size") * (2 if shared and keys.flag("use_double_wide_mlp", default=False) else 1)
    gate = (
        Linear("per_layer_input_gate", hidden, narrow, False, "mlp_in"),
        Linear("per_layer_projection", narrow, hidden, False, "mlp_out"),
    )
    experts = _experts(keys)
    routing = (
        Kept("router.scale", hidden, router(0).reason),
        Kept("router.per_expert_scale", experts.count, router(0).reason),
        router(experts.count * hidden, "router.proj"),
    ) if experts else ()  # fmt: skip
    return LayerShape(
        hidden=hidden,
        linears=(
            *_attention(keys, kind, kv_heads, head_dim, shared=shared),
            *mlp_linears(hidden, inner),
            *(gate if narrow else ()),
        ),
        intermediate=inner,
        heads=keys.count("num_attention_heads"),
        kv_heads=kv_heads,
        head_dim=head_dim,
        norms=4 + bool(narrow) + 3 * bool(experts),
        qk_norm=not shared,
        experts=experts,
        kept=(*((Kept("self_attn.q_norm", head_dim, NORM),) if shared else ()), *routing),
    )


def _together_from(keys: Keys, kinds: list[str]) -> int | None:
    """The first of the layers whose keys and values later ones read: the last of each kind that makes its own."""
    own = len(kinds) - keys.count("num_kv_shared_layers", least=0)
    made = {kind: layer for layer, kind in enumerate(kinds[:own])}
    return min((made[kind] for kind in kinds[own:]), default=None)


def _read_text(keys: Keys) -> ModelFacts:
    keys = keys.over(_DEFAULTS)
    kinds, hidden = _kinds(keys), keys.count("hidden_size")
    width = keys.count("hidden_size_per_layer_input", least=0) * len(kinds)
    outer = keys.count("vocab_size_per_layer_input") * width + hidden * width + width // len(kinds)
    return read_model(
        keys,
        in_runs(_layer(keys, layer, kind) for layer, kind in enumerate(kinds)),
        tied=True,
        together_from=_together_from(keys, kinds),
        outer_parameters=outer,
        unsplit="gives its layers per_layer_input beside hidden states" if width else "",
    )


def _vision(keys: Keys, hidden: int) -> tuple[Kept, ...]:
    if not keys.states("vision_config"):
        return ()
    vision = keys.inner("vision_config")
    projection = vision.count("hidden_size", default=768) * hidden
    return (
        towers.left_out("model.vision_tower", towers.gemma4(vision)),
        towers.left_out("model.embed_vision", projection),
    )


def _read(keys: Keys) -> ModelFacts:
    hidden = keys.inner("text_config").over(_DEFAULTS).count("hidden_size")
    return read_wrapped(keys, _read_text, _vision(keys, hidden), tied=True)


def _gemma4(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, every: int = 6, **more: Any) -> Config:
    text: Config = {
        "model_type": "gemma4_text",
        "vocab_size": 262_144,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "global_head_dim": 512,
        "layer_types": [_SLIDING if (layer + 1) % every else _FULL for layer in range(layers)],
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        **more,
    }
    return {
        "model_type": "gemma4",
        "text_config": text,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
    }


_LARGE: Config = {
    "max_position_embeddings": 262_144,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
}
_SMALL: Config = {"max_position_embeddings": 131_072, "sliding_window": 512}
_EXPERTS: Config = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
_TUNED: dict[str, Config] = {"it": {}}

GEMMA4_TEXT = Family(model_type="gemma4_text", read=_read_text, measured=False)
GEMMA4 = Family(
    model_type="gemma4",
    read=_read,
    modules=WRAPPED,
    measured=False,
    aliases={
        "gemma4-e2b": Alias(
            "google/gemma-4-E2B",
            _gemma4(1536, 6144, 35, 8, 1, 5, num_kv_shared_layers=20, use_double_wide_mlp=True, **_SMALL),
            _TUNED,
        ),
        "gemma4-26b-a4b": Alias(
            "google/gemma-4-26B-A4B",
            _gemma4(2816, 2112, 30, 16, 8, num_global_key_value_heads=2, **_LARGE, **_EXPERTS),
            _TUNED,
        ),
        "gemma4-31b": Alias(
            "google/gemma-4-31B", _gemma4(5376, 21_504, 60, 32, 16, num_global_key_value_heads=4, **_LARGE), _TUNED
        ),
    },
)
