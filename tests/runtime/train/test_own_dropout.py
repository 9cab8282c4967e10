"""Which models draw from torch's generator in training: recomputing them needs its state, which a graph cannot read."""

from typing import Any

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from qdist.runtime.train.setup import has_own_dropout

SMALL: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {**SMALL, "intermediate_size": 16, "num_key_value_heads": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**LLAMA), False),
        (LlamaConfig(**LLAMA, attention_dropout=0.1), True),
        (GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2), True),  # 0.1 by its class
        (GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                    summary_first_dropout=0.0), False),
        (OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16), True),
    ],
)  # fmt: skip
def test_dropout_of_a_model_is_seen_where_its_class_has_it(config: Any, expected: bool) -> None:
    assert has_own_dropout(AutoModelForCausalLM.from_config(config)) is expected


def test_dropout_of_adapters_does_not_count() -> None:
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA))
    model.model.layers[0].lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.1)})
    assert not has_own_dropout(model)
