"""Qwen3's mixtures of experts: Qwen3's attention, experts in place of the MLP."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, count_layers, decoder_config, read_model
from qdist.core.model.families.layers import Mlp, attention_linears, gated_experts, in_runs, mlp_linears, router
from qdist.core.model.shapes import LayerShape, ModelFacts


def _layer(keys: Keys, mlp: Mlp) -> LayerShape:
    hidden, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    kv_heads, head_dim = keys.count("num_key_value_heads", default=4), keys.count("head_dim", default=hidden // heads)
    bias = keys.flag("attention_bias", default=False)
    return LayerShape(
        hidden=hidden,
        linears=(*attention_linears(hidden, heads, kv_heads, head_dim, bias=bias), *mlp.linears),
        intermediate=mlp.intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qk_norm=True,
        experts=mlp.experts,
        kept=mlp.kept,
    )


def _read(keys: Keys) -> ModelFacts:
    hidden, inner = keys.count("hidden_size"), keys.count("intermediate_size", default=6144)
    count = keys.count("num_experts", "num_local_experts", default=128)
    width = keys.count("moe_intermediate_size", default=768)
    active = keys.count("num_experts_per_tok", default=8)
    experts = gated_experts(hidden, width, count=count, active=active)
    dense = _layer(keys, Mlp(mlp_linears(hidden, inner), inner))
    sparse = _layer(keys, Mlp((), width, experts, (router(count * hidden),)))
    every, dense_only = keys.count("decoder_sparse_step", default=1), keys.counts("mlp_only_layers")
    is_dense = [layer in dense_only or (layer + 1) % every != 0 for layer in range(count_layers(keys))]
    return read_model(keys, in_runs(dense if each else sparse for each in is_dense), max_positions=32_768)


def _qwen3(hidden: int, inner: int, layers: int, heads: int, width: int) -> Config:
    return decoder_config(
        "qwen3_moe", hidden, inner, layers, heads, 4, vocab=151_936, positions=40_960, theta=1_000_000.0,
        bos=151_643, eos=151_645, head_dim=128, moe_intermediate_size=width, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True,
    )  # fmt: skip


_TUNED: dict[str, Config] = {"base": {"max_position_embeddings": 32_768, "eos_token_id": 151_643}}

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    read=_read,
    aliases={
        "qwen3-30b-a3b": Alias("Qwen/Qwen3-30B-A3B", _qwen3(2048, 6144, 48, 32, 768), _TUNED),
        "qwen3-235b-a22b": Alias("Qwen/Qwen3-235B-A22B", _qwen3(4096, 12_288, 94, 64, 1536)),
    },
)
