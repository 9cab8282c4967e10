"""Which layers have models of latent attention (MLA), whose first ones have an MLP and the others experts?"""

from collections.abc import Iterable

from qdist.core.model.config import Keys
from qdist.core.model.families.family import count_layers, read_model
from qdist.core.model.families.layers import NORM, Mlp, gated_experts, in_runs, mlp_linears, router
from qdist.core.model.shapes import Kept, LayerShape, Linear, ModelFacts


def read_latent(keys: Keys, dense: Iterable[bool], *, mlp_bias: bool = False) -> ModelFacts:
    """Facts of a model of latent attention. dense: whether each layer has an MLP instead of experts."""
    plain, sparse = _layer(keys, dense_mlp(keys, bias=mlp_bias)), _layer(keys, shared_mlp(keys, bias=mlp_bias))
    return read_model(keys, in_runs(plain if each else sparse for each in dense))


def first_dense(keys: Keys) -> list[bool]:
    """Whether each layer has an MLP: the first ones."""
    first = keys.count("first_k_dense_replace", least=0)
    return [layer < first for layer in range(count_layers(keys))]


def dense_mlp(keys: Keys, *, bias: bool = False) -> Mlp:
    """The MLP of a layer without experts."""
    inner = keys.count("intermediate_size")
    return Mlp(mlp_linears(keys.count("hidden_size"), inner, bias=bias), inner)


def shared_mlp(keys: Keys, *, bias: bool = False) -> Mlp:
    """Routed experts, and those that every token visits, which are one MLP."""
    hidden, width = keys.count("hidden_size"), keys.count("moe_intermediate_size")
    count, shared = keys.count("n_routed_experts"), keys.count("n_shared_experts") * width
    experts = gated_experts(hidden, width, count=count, active=keys.count("num_experts_per_tok"))
    linears = mlp_linears(hidden, shared, bias=bias, within="mlp.shared_experts")
    return Mlp(linears, shared, experts, (router(count * hidden),))


def _layer(keys: Keys, mlp: Mlp) -> LayerShape:
    """Queries, keys and values are made from narrow vectors, each behind a norm."""
    hidden, heads, rank = (keys.count(key) for key in ("hidden_size", "num_attention_heads", "kv_lora_rank"))
    rotated, value_dim = keys.count("qk_rope_head_dim"), keys.count("v_head_dim")
    plain, bias = keys.count("qk_nope_head_dim"), keys.flag("attention_bias", default=False)
    head_dim, query_rank = plain + rotated, 0 if keys.is_null("q_lora_rank") else keys.count("q_lora_rank")
    through = (
        Linear("q_a_proj", hidden, query_rank, bias, "attention_in"),
        Linear("q_b_proj", query_rank, heads * head_dim, False, "attention_in"),
    )
    queries = through if query_rank else (Linear("q_proj", hidden, heads * head_dim, False, "attention_in"),)
    query_norm = (Kept("self_attn.q_a_layernorm", query_rank, NORM),) if query_rank else ()
    return LayerShape(
        hidden=hidden,
        linears=(
            *queries,
            Linear("kv_a_proj_with_mqa", hidden, rank + rotated, bias, "attention_in"),
            Linear("kv_b_proj", rank, heads * (plain + value_dim), False, "attention_in"),
            Linear("o_proj", heads * value_dim, hidden, bias, "attention_out"),
            *mlp.linears,
        ),
        intermediate=mlp.intermediate,
        heads=heads,
        kv_heads=keys.count("num_key_value_heads", default=heads),
        head_dim=head_dim,
        attention="repacked",
        experts=mlp.experts,
        kept=(*query_norm, Kept("self_attn.kv_a_layernorm", rank, NORM), *mlp.kept),
    )
