"""Qwen3.5, 3.6 and Qwen3-Next: three layers of Gated DeltaNet, then one of attention whose output has a gate."""

from collections.abc import Callable
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
from qdist.core.model.families.layers import (
    CONVOLUTION,
    NORM,
    RECURRENCE,
    TOO_SMALL,
    Mlp,
    attention_linears,
    gated_experts,
    in_runs,
    mlp_linears,
    router,
)
from qdist.core.model.shapes import Kept, LayerShape, Linear, ModelFacts

_COMMON: Config = {
    "vocab_size": 248_320,
    "num_attention_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
}
_EXPERTS: Config = {
    "hidden_size": 2048,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_DENSE_DEFAULTS: Config = {
    **_COMMON,
    "model_type": "qwen3_5_text",
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
_MOE_DEFAULTS: Config = {
    **_COMMON,
    **_EXPERTS,
    "model_type": "qwen3_5_moe_text",
    "num_hidden_layers": 40,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}
_NEXT_DEFAULTS: Config = {
    **_COMMON,
    **_EXPERTS,
    "vocab_size": 151_936,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_experts_per_tok": 10,
    "num_experts": 512,
    "decoder_sparse_step": 1,
}
"""Those of transformers' classes."""


def _dense(keys: Keys) -> Mlp:
    inner = keys.count("intermediate_size")
    return Mlp(mlp_linears(keys.count("hidden_size"), inner), inner)


def _sparse(keys: Keys) -> Mlp:
    """Experts, and one that every token visits, weighed by a gate of one row."""
    hidden, shared = keys.count("hidden_size"), keys.count("shared_expert_intermediate_size")
    count = keys.count("num_experts")
    experts = gated_experts(
        hidden, keys.count("moe_intermediate_size"), count=count, active=keys.count("num_experts_per_tok")
    )
    kept = (router(count * hidden), Kept("mlp.shared_expert_gate", hidden, TOO_SMALL))
    return Mlp(mlp_linears(hidden, shared, within="mlp.shared_expert"), shared, experts, kept)


def _full_layer(keys: Keys, mlp: Mlp) -> LayerShape:
    hidden, heads, head_dim = (keys.count(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    kv_heads, bias = keys.count("num_key_value_heads"), keys.flag("attention_bias", default=False)
    return LayerShape(
        hidden=hidden,
        linears=(*attention_linears(hidden, heads, kv_heads, head_dim, bias=bias, query_gate=True), *mlp.linears),
        intermediate=mlp.intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qk_norm=True,
        attention="repacked",
        experts=mlp.experts,
        kept=mlp.kept,
    )


def _recurrent_layer(keys: Keys, mlp: Mlp, *, fused: bool = False) -> LayerShape:
    """A layer of Gated DeltaNet. fused: its four projections of the input are two."""
    hidden, head_dim = keys.count("hidden_size"), keys.count("linear_value_head_dim")
    heads = keys.count("linear_num_value_heads")
    width = heads * head_dim
    mixed = 2 * keys.count("linear_num_key_heads") * keys.count("linear_key_head_dim") + width
    apart = [("in_proj_qkv", mixed), ("in_proj_z", width)]
    into = [("in_proj_qkvz", mixed + width)] if fused else apart
    gates = [("in_proj_ba", 2 * heads)] if fused else [("in_proj_b", heads), ("in_proj_a", heads)]
    projections = [Linear(leaf, hidden, outputs, False, "attention_in") for leaf, outputs in into]
    out = Linear("out_proj", width, hidden, False, "attention_out")
    return LayerShape(
        hidden=hidden,
        linears=(*((*projections, out) if fused else (out, *projections)), *mlp.linears),
        intermediate=mlp.intermediate,
        heads=0,
        kv_heads=0,
        head_dim=0,
        attention="repacked",
        mixer="recurrent",
        experts=mlp.experts,
        kept=(
            Kept("linear_attn.dt_bias", heads, RECURRENCE),
            Kept("linear_attn.A_log", heads, RECURRENCE),
            Kept("linear_attn.conv1d", mixed * keys.count("linear_conv_kernel_dim"), CONVOLUTION),
            Kept("linear_attn.norm", head_dim, NORM),
            *(Kept(f"linear_attn.{leaf}", hidden * outputs, TOO_SMALL) for leaf, outputs in gates),
            *mlp.kept,
        ),
    )


def _kinds(keys: Keys) -> tuple[str, ...]:
    """What mixes tokens in each layer."""
    count, every = count_layers(keys), keys.count("full_attention_interval")
    pattern = ["full_attention" if (layer + 1) % every == 0 else "linear_attention" for layer in range(count)]
    return keys.texts("layer_types", default=pattern, length=count)


def _read_layers(keys: Keys, mlps: Callable[[int], Mlp], *, fused: bool = False) -> ModelFacts:
    layers = in_runs(
        _full_layer(keys, mlps(layer)) if kind == "full_attention" else _recurrent_layer(keys, mlps(layer), fused=fused)
        for layer, kind in enumerate(_kinds(keys))
    )
    return read_model(keys, layers)


def _read_text(keys: Keys) -> ModelFacts:
    keys = keys.over(_DENSE_DEFAULTS)
    mlp = _dense(keys)
    return _read_layers(keys, lambda _: mlp)


def _read_moe_text(keys: Keys) -> ModelFacts:
    keys = keys.over(_MOE_DEFAULTS)
    mlp = _sparse(keys)
    return _read_layers(keys, lambda _: mlp)


def _read_next(keys: Keys) -> ModelFacts:
    keys = keys.over(_NEXT_DEFAULTS)
    dense, sparse, every = _dense(keys), _sparse(keys), keys.count("decoder_sparse_step")
    dense_only = keys.counts("mlp_only_layers")
    return _read_layers(keys, lambda layer: dense if layer in dense_only or (layer + 1) % every else sparse, fused=True)


def _read(keys: Keys) -> ModelFacts:
    return read_wrapped(keys, _read_text, _left_out(keys))


def _read_moe(keys: Keys) -> ModelFacts:
    return read_wrapped(keys, _read_moe_text, _left_out(keys))


def _left_out(keys: Keys) -> tuple[Kept, ...]:
    return (towers.left_out("model.visual", towers.qwen(keys.inner("vision_config"))),)


def _wrapped(model_type: str, text: Config, vision: Config, *, tied: bool = False) -> Config:
    common: Config = {
        "model_type": f"{model_type}_text",
        "vocab_size": 248_320,
        "max_position_embeddings": 262_144,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "eos_token_id": 248_044,
        "tie_word_embeddings": tied,
    }
    return {
        "model_type": model_type,
        "text_config": {**common, **text},
        "vision_config": {"model_type": model_type, **vision},
        "tie_word_embeddings": tied,
    }


def _qwen35(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, value_heads: int, vision: Config, **more: Any
) -> Config:
    text = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "linear_num_value_heads": value_heads,
    }
    return _wrapped("qwen3_5", text, {**vision, "out_hidden_size": hidden}, **more)


_35B_A3B = _wrapped(
    "qwen3_5_moe",
    {**_MOE_DEFAULTS, "max_position_embeddings": 262_144},
    {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 2048},
)
_LARGE: Config = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
_NEXT: Config = {
    **_NEXT_DEFAULTS,
    "model_type": "qwen3_next",
    "max_position_embeddings": 262_144,
    "rope_theta": 10_000_000.0,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}
_TUNED: dict[str, Config] = {"base": {}}

QWEN3_5_TEXT = Family(model_type="qwen3_5_text", read=_read_text)
QWEN3_5_MOE_TEXT = Family(model_type="qwen3_5_moe_text", read=_read_moe_text, measured=False)
QWEN3_5 = Family(
    model_type="qwen3_5",
    read=_read,
    modules=WRAPPED,
    aliases={
        "qwen3.5-9b": Alias("Qwen/Qwen3.5-9B", _qwen35(4096, 12_288, 32, 16, 4, 32, _LARGE), _TUNED),
        "qwen3.5-27b": Alias("Qwen/Qwen3.5-27B", _qwen35(5120, 17_408, 64, 24, 4, 48, _LARGE), also=("Qwen3.6-27B",)),
    },
)
QWEN3_5_MOE = Family(
    model_type="qwen3_5_moe",
    read=_read_moe,
    modules=WRAPPED,
    experts_together=True,
    measured=False,
    aliases={
        "qwen3.5-35b-a3b": Alias("Qwen/Qwen3.5-35B-A3B", _35B_A3B, _TUNED, also=("Qwen3.6-35B-A3B",)),
    },
)
QWEN3_NEXT = Family(
    model_type="qwen3_next",
    read=_read_next,
    measured=False,
    aliases={"qwen3-next-80b-a3b": Alias("Qwen/Qwen3-Next-80B-A3B-Instruct", _NEXT, {"instruct": {}, "thinking": {}})},
)
