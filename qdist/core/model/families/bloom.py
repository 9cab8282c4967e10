"""BLOOM: a norm behind the embedding, ALiBi, biases everywhere, no bound on positions but the trained 2,048."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, fused_linears, read_facts
from qdist.core.model.shapes import ModelFacts, Modules


def _read(keys: Keys) -> ModelFacts:
    hidden = keys.count("hidden_size", "n_embed")
    return read_facts(
        keys,
        fused_linears(hidden, 4 * hidden, True),
        norm="layer",
        outer_norms=2,
        tied=True,
        mlp="gelu",
        attention="eager",
        max_positions=2048,
    )


def _bloom(hidden: int, layers: int, heads: int) -> Config:
    return {
        "model_type": "bloom",
        "hidden_size": hidden,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": 250_880,
        "seq_length": 2048,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }


BLOOM = Family(
    model_type="bloom",
    read=_read,
    modules=Modules(
        embedding="transformer.word_embeddings",
        before=("transformer.word_embeddings_layernorm",),
        shared=(),
        layers="transformer.h",
        final_norm="transformer.ln_f",
    ),
    aliases={
        "bloom-560m": Alias("bigscience/bloom-560m", _bloom(1024, 24, 16)),
        "bloom-1b7": Alias("bigscience/bloom-1b7", _bloom(2048, 24, 16)),
        "bloom-3b": Alias("bigscience/bloom-3b", _bloom(2560, 30, 32)),
        "bloom-7b1": Alias("bigscience/bloom-7b1", _bloom(4096, 30, 32)),
        "bloom-176b": Alias("bigscience/bloom", _bloom(14_336, 70, 112)),
    },
)
