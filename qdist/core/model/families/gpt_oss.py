"""gpt-oss: transposed experts with biases, biases in attention too, and a sink a head, which no flash kernel has."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, decoder_config, read_facts
from qdist.core.model.families.layers import SINKS, attention_linears, gated_experts, router
from qdist.core.model.shapes import Kept, ModelFacts


def _read(keys: Keys) -> ModelFacts:
    hidden, inner = keys.count("hidden_size", default=2880), keys.count("intermediate_size", default=2880)
    heads, kv_heads = keys.count("num_attention_heads", default=64), keys.count("num_key_value_heads", default=8)
    head_dim = keys.count("head_dim", default=64)
    count = keys.count("num_local_experts", "num_experts", default=128)
    active = keys.count("num_experts_per_tok", default=4)
    return read_facts(
        keys,
        attention_linears(hidden, heads, kv_heads, head_dim, bias=keys.flag("attention_bias", default=True)),
        head_dim=head_dim,
        kv_heads=kv_heads,
        intermediate=inner,
        attention="eager",
        experts=gated_experts(hidden, inner, count=count, active=active, bias=True, transposed=True),
        kept=(Kept("self_attn.sinks", heads, SINKS), router(count * (hidden + 1), "mlp.router")),
    )


def _gpt_oss(layers: int, experts: int) -> Config:
    rope = {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
    return decoder_config(
        "gpt_oss", 2880, 2880, layers, 64, 8, vocab=201_088, positions=131_072, theta=150_000.0, eps=1e-5, bos=None,
        eos=200_002, pad_token_id=199_999, head_dim=64, num_local_experts=experts, num_experts_per_tok=4,
        sliding_window=128, attention_bias=True, rope_scaling=rope, quantization_config={"quant_method": "mxfp4"},
    )  # fmt: skip


GPT_OSS = Family(
    model_type="gpt_oss",
    read=_read,
    experts_together=True,
    aliases={
        "gpt-oss-20b": Alias("openai/gpt-oss-20b", _gpt_oss(24, 32)),
        "gpt-oss-120b": Alias("openai/gpt-oss-120b", _gpt_oss(36, 128)),
    },
)
