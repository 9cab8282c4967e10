"""Do the terms for recurrences, gated attention, four norms and heads free of the width count what torch saves?"""

from typing import Any

import pytest

from qdist.core.model.shapes import Kept, LayerShape, Linear
from qdist.core.planning.activations import saved_bytes_per_token
from tests.models import attention, experts_of, gated_mlp
from tests.saved_tensors import saved_by

BATCH, LENGTH, RANK = 2, 128, 8
WIDTHS = {
    "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 128, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
HYBRID = WIDTHS | {
    "model_type": "qwen3_5_text", "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
}  # fmt: skip
FULL = LayerShape(
    hidden=64, linears=(*attention(64, 128, 64, gated=True), *gated_mlp(64, 160)), intermediate=160, heads=4,
    kv_heads=2, head_dim=32, qk_norm=True, attention="repacked",
)  # fmt: skip
RECURRENT = LayerShape(
    hidden=64,
    linears=(
        Linear("in_proj_qkv", 64, 256, False, "attention_in"), Linear("in_proj_z", 64, 128, False, "attention_in"),
        Linear("out_proj", 128, 64, False, "attention_out"), *gated_mlp(64, 160),
    ),
    intermediate=160, heads=0, kv_heads=0, head_dim=0, mixer="recurrent",
    kept=(Kept("linear_attn.A_log", 4, "decay"),),
)  # fmt: skip
FOUR_NORMS = LayerShape(
    hidden=64, linears=(*attention(64, 128, 64), *gated_mlp(64, 160)), intermediate=160, heads=4, kv_heads=2,
    head_dim=32, norms=4, qk_norm=True,
)  # fmt: skip
SPARSE = LayerShape(
    hidden=64, linears=attention(64, 128, 64), intermediate=48, heads=4, kv_heads=2, head_dim=32, qk_norm=True,
    experts=experts_of(64, 48, 8, 2), kept=(Kept("mlp.gate", 8 * 64, "router"),),
)  # fmt: skip
LAYERS: dict[str, tuple[LayerShape, dict[str, Any]]] = {
    "linear_attention": (RECURRENT, HYBRID),
    "full_attention": (FULL, HYBRID),
    "experts": (
        SPARSE,
        WIDTHS
        | {
            "model_type": "qwen3_moe",
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    "gemma3": (
        FOUR_NORMS,
        WIDTHS | {"model_type": "gemma3_text", "sliding_window": 64},
    ),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_autograd_saves_in_a_layer_of_each_kind_what_the_terms_say(kind: str, autocast: bool) -> None:
    shape = LAYERS[kind][0]
    targets = tuple(dict.fromkeys(linear.name for linear in shape.linears))
    three, two = (
        saved_by(
            layered(kind, count), targets, 0.0, rank=RANK, batch=BATCH, length=LENGTH, bits=16, autocast=autocast,
            fused_lora=True, our_experts=shape.experts is not None,
        )
        for count in (3, 2)
    )  # fmt: skip
    own = saved_bytes_per_token(
        shape, bits=16, compute_bytes=2 if autocast else 4, rank_r=RANK, targets=targets, seq_len=LENGTH,
        fused_layers=False, fused_lora=True, lora_dropout=False,
    )  # fmt: skip
    assert own == pytest.approx((three - two) / (BATCH * LENGTH), rel=0.02)


def layered(kind: str, count: int) -> dict[str, Any]:
    """A configuration of `count` layers of one kind."""
    mixed = kind if kind.endswith("attention") else "full_attention"
    kinds = {} if kind == "experts" else {"layer_types": [mixed] * count}
    return LAYERS[kind][1] | {"num_hidden_layers": count} | kinds
