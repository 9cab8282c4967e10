"""GPT-2: learned positions, and linears that transformers stores transposed (`Conv1D`)."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, read_facts
from qdist.core.model.shapes import Linear, ModelFacts, Modules


def _read(keys: Keys) -> ModelFacts:
    hidden = keys.count("n_embd", "hidden_size")
    inner = keys.count("n_inner", default=4 * hidden)
    linears = (
        Linear("c_attn", hidden, 3 * hidden, True, "attention_in", transposed=True),
        Linear("c_proj", hidden, hidden, True, "attention_out", "attn", transposed=True),
        Linear("c_fc", hidden, inner, True, "mlp_in", transposed=True),
        Linear("c_proj", inner, hidden, True, "mlp_out", "mlp", transposed=True),
    )
    rows = keys.count("n_positions", "max_position_embeddings", default=1024)
    return read_facts(keys, linears, norm="layer", mlp="gelu", tied=True, learned_positions=rows, max_positions=rows)


def _gpt2(hidden: int, layers: int, heads: int) -> Config:
    return {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
        "vocab_size": 50_257,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
    }


GPT2 = Family(
    model_type="gpt2",
    read=_read,
    modules=Modules(
        embedding="transformer.wte",
        before=("transformer.drop",),
        added=("transformer.wpe",),
        shared=(),
        layers="transformer.h",
        final_norm="transformer.ln_f",
    ),
    measured=False,
    aliases={
        "gpt2": Alias("openai-community/gpt2", _gpt2(768, 12, 12)),
        "gpt2-medium": Alias("openai-community/gpt2-medium", _gpt2(1024, 24, 16)),
        "gpt2-large": Alias("openai-community/gpt2-large", _gpt2(1280, 36, 20)),
        "gpt2-xl": Alias("openai-community/gpt2-xl", _gpt2(1600, 48, 25)),
    },
)
