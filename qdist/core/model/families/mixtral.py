"""Mixtral: Mistral's attention, eight experts in place of the MLP."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, decoder_config, read_facts
from qdist.core.model.families.layers import attention_linears, gated_experts, router
from qdist.core.model.shapes import ModelFacts


def _read(keys: Keys) -> ModelFacts:
    hidden, heads, inner = (keys.count(key) for key in ("hidden_size", "num_attention_heads", "intermediate_size"))
    kv_heads, head_dim = keys.count("num_key_value_heads", default=8), keys.count("head_dim", default=hidden // heads)
    count = keys.count("num_local_experts", "num_experts", default=8)
    return read_facts(
        keys,
        attention_linears(hidden, heads, kv_heads, head_dim),
        head_dim=head_dim,
        kv_heads=kv_heads,
        intermediate=inner,
        experts=gated_experts(hidden, inner, count=count, active=keys.count("num_experts_per_tok", default=2)),
        kept=(router(count * hidden),),
    )


def _mixtral(hidden: int, inner: int, layers: int, heads: int, positions: int) -> Config:
    return decoder_config(
        "mixtral", hidden, inner, layers, heads, 8, vocab=32_000, positions=positions, theta=1_000_000.0, eps=1e-5,
        num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
    )  # fmt: skip


MIXTRAL = Family(
    model_type="mixtral",
    read=_read,
    measured=False,
    aliases={
        "mixtral-8x7b": Alias("mistralai/Mixtral-8x7B-v0.1", _mixtral(4096, 14_336, 32, 32, 32_768), {"instruct": {}}),
        "mixtral-8x22b": Alias("mistralai/Mixtral-8x22B-v0.1", _mixtral(6144, 16_384, 56, 48, 65_536)),
    },
)
