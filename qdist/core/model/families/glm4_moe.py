"""GLM-4.5 to 4.7: a dense layer or more, then experts and a shared one; 4.7-Flash with latent attention."""

from typing import Any

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, count_layers, decoder_config, read_model
from qdist.core.model.families.latent import dense_mlp, first_dense, read_latent, shared_mlp
from qdist.core.model.families.layers import Mlp, attention_linears, in_runs
from qdist.core.model.shapes import LayerShape, ModelFacts

_DEFAULTS: Config = {
    "num_key_value_heads": 8,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131_072,
}
_LITE_DEFAULTS: Config = {
    "moe_intermediate_size": 1536,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "kv_lora_rank": 512,
    "q_lora_rank": 768,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "max_position_embeddings": 202_752,
}
"""Those of transformers' classes."""


def _layer(keys: Keys, mlp: Mlp) -> LayerShape:
    hidden, heads, kv_heads = (keys.count(key) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head_dim, bias = keys.count("head_dim", default=hidden // heads), keys.flag("attention_bias", default=False)
    return LayerShape(
        hidden=hidden,
        linears=(*attention_linears(hidden, heads, kv_heads, head_dim, bias=bias, out_bias=False), *mlp.linears),
        intermediate=mlp.intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qk_norm=keys.flag("use_qk_norm", default=False),
        attention="repacked",
        experts=mlp.experts,
        kept=mlp.kept,
    )


def _read(keys: Keys) -> ModelFacts:
    keys = keys.over(_DEFAULTS)
    plain, sparse = _layer(keys, dense_mlp(keys)), _layer(keys, shared_mlp(keys))
    return read_model(keys, in_runs(plain if dense else sparse for dense in first_dense(keys)))


def _read_lite(keys: Keys) -> ModelFacts:
    keys = keys.over(_LITE_DEFAULTS)
    count = count_layers(keys)
    kinds = keys.texts("mlp_layer_types", default=["dense", *["sparse"] * (count - 1)], length=count)
    return read_latent(keys, [kind != "sparse" for kind in kinds])


def _glm45(hidden: int, inner: int, layers: int, **more: Any) -> Config:
    return decoder_config(
        "glm4_moe", hidden, inner, layers, 96, 8, vocab=151_552, positions=131_072, theta=1_000_000.0, eps=1e-5,
        head_dim=128, partial_rotary_factor=0.5, attention_bias=True, num_experts_per_tok=8, n_shared_experts=1,
        pad_token_id=151_329, bos=None, eos=[151_329, 151_336, 151_338], **more,
    )  # fmt: skip


_FLASH = decoder_config(
    "glm4_moe_lite", 2048, 10_240, 47, 20, 20, vocab=154_880, theta=1_000_000.0, eps=1e-5, positions=202_752,
    kv_lora_rank=512, q_lora_rank=768, qk_rope_head_dim=64, qk_nope_head_dim=192, v_head_dim=256,
    moe_intermediate_size=1536, num_experts_per_tok=4, n_shared_experts=1, n_routed_experts=64,
    routed_scaling_factor=1.8, bos=None, eos=[154_820, 154_827, 154_829], pad_token_id=154_820,
)  # fmt: skip

GLM4_MOE = Family(
    model_type="glm4_moe",
    read=_read,
    measured=False,
    aliases={
        "glm-4.5-air": Alias(
            "zai-org/GLM-4.5-Air",
            _glm45(4096, 10_944, 46, moe_intermediate_size=1408, n_routed_experts=128, first_k_dense_replace=1),
            {"base": {}},
        ),
        "glm-4.5": Alias(
            "zai-org/GLM-4.5",
            _glm45(
                5120,
                12_288,
                92,
                moe_intermediate_size=1536,
                n_routed_experts=160,
                first_k_dense_replace=3,
                use_qk_norm=True,
                routed_scaling_factor=2.5,
            ),
            {"base": {}},
        ),
    },
)
GLM4_MOE_LITE = Family(
    model_type="glm4_moe_lite",
    read=_read_lite,
    measured=False,
    aliases={"glm-4.7-flash": Alias("zai-org/GLM-4.7-Flash", _FLASH)},
)
