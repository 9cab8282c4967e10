"""DeepSeek V2 and V3: latent attention, the first layers dense, experts and shared experts in the others."""

from typing import Any

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, decoder_config
from qdist.core.model.families.latent import first_dense, read_latent
from qdist.core.model.shapes import ModelFacts

_LATENT: Config = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
_V2: Config = {
    **_LATENT,
    "v_head_dim": 128,
    "first_k_dense_replace": 0,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
    "max_position_embeddings": 2048,
}
_V3: Config = {
    **_LATENT,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
}
"""Those of transformers' classes."""


def _read_v2(keys: Keys) -> ModelFacts:
    keys = keys.over(_V2)
    return read_latent(keys, first_dense(keys), mlp_bias=keys.flag("mlp_bias", default=False))


def _read_v3(keys: Keys) -> ModelFacts:
    keys = keys.over(_V3)
    return read_latent(keys, first_dense(keys))


def _deepseek(model_type: str, hidden: int, inner: int, layers: int, heads: int, **more: Any) -> Config:
    rope = {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    rope |= more.pop("rope", {})
    return decoder_config(
        model_type, hidden, inner, layers, heads, heads, positions=163_840, rope_scaling=rope, **{**_LATENT, **more}
    )


_LITE = _deepseek(
    "deepseek_v2", 2048, 10_944, 27, 16, vocab=102_400, q_lora_rank=None, v_head_dim=128, first_k_dense_replace=1,
    moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
    bos=100_000, eos=100_001, rope={"mscale": 0.707, "mscale_all_dim": 0.707},
)  # fmt: skip
_671B = _deepseek(
    "deepseek_v3", 7168, 18_432, 61, 128, vocab=129_280, v_head_dim=128, first_k_dense_replace=3,
    moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
    n_group=8, topk_group=4, routed_scaling_factor=2.5, bos=0, eos=1,
)  # fmt: skip

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    read=_read_v2,
    measured=False,
    aliases={"deepseek-v2-lite": Alias("deepseek-ai/DeepSeek-V2-Lite", _LITE, {"chat": {}})},
)
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    read=_read_v3,
    measured=False,
    aliases={"deepseek-v3": Alias("deepseek-ai/DeepSeek-V3", _671B, {"base": {}})},
)
