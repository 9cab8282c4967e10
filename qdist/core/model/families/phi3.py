"""Phi-3 and Phi-4: Llama's layer with queries, keys and values in one linear, gate and up in another."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, decoder_config, read_facts
from qdist.core.model.families.layers import mlp_linears
from qdist.core.model.shapes import Linear, ModelFacts


def _read(keys: Keys) -> ModelFacts:
    hidden, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    kv_heads = keys.count("num_key_value_heads", default=heads)
    if not keys.states("head_dim"):
        keys.divides("num_attention_heads", heads, "hidden_size", hidden)
    head_dim = keys.count("head_dim", default=hidden // heads)
    linears = (
        Linear("o_proj", heads * head_dim, hidden, False, "attention_out"),
        Linear("qkv_proj", hidden, (heads + 2 * kv_heads) * head_dim, False, "attention_in"),
        *mlp_linears(hidden, keys.count("intermediate_size"), fused=True),
    )
    return read_facts(keys, linears, head_dim=head_dim, kv_heads=kv_heads, attention="joined")


def _phi3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Config:
    return decoder_config(
        "phi3", hidden, inner, layers, heads, kv_heads, vocab=32_064, positions=4096, eps=1e-5, eos=32_000,
        pad_token_id=32_000, original_max_position_embeddings=4096, sliding_window=2047,
    )  # fmt: skip


_PHI4 = decoder_config(
    "phi3", 5120, 17_920, 40, 40, 10, vocab=100_352, positions=16_384, theta=250_000.0, eps=1e-5,
    bos=100_257, eos=100_265, pad_token_id=100_349, original_max_position_embeddings=16_384, sliding_window=None,
)  # fmt: skip

PHI3 = Family(
    model_type="phi3",
    read=_read,
    aliases={
        "phi-3-mini": Alias("microsoft/Phi-3-mini-4k-instruct", _phi3(3072, 8192, 32, 32, 32)),
        "phi-3-medium": Alias("microsoft/Phi-3-medium-4k-instruct", _phi3(5120, 17_920, 40, 40, 10)),
        "phi-4": Alias("microsoft/phi-4", _PHI4),
    },
)
