"""OPT: learned positions, two rows more than it can use. The 350M variant has shapes of its own and is refused."""

from qdist.core.errors import ModelError
from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, read_facts
from qdist.core.model.shapes import Linear, ModelFacts, Modules


def _read(keys: Keys) -> ModelFacts:
    hidden, inner = keys.count("hidden_size"), keys.count("ffn_dim")
    embedded, bias = keys.count("word_embed_proj_dim", default=hidden), keys.flag("enable_bias", default=True)
    norm_first = keys.flag("do_layer_norm_before", default=True)
    if embedded != hidden or not norm_first or not keys.flag("layer_norm_elementwise_affine", default=True):
        raise ModelError(
            f"{keys.name}: OPT with a projected embedding or norms behind is not supported", try_="opt-1.3b"
        )
    linears = (
        *(Linear(leaf, hidden, hidden, bias, "attention_in") for leaf in ("k_proj", "v_proj", "q_proj")),
        Linear("out_proj", hidden, hidden, bias, "attention_out"),
        Linear("fc1", hidden, inner, bias, "mlp_in"),
        Linear("fc2", inner, hidden, bias, "mlp_out"),
    )
    rows = keys.count("max_position_embeddings") + 2
    mlp = "relu" if keys.text("activation_function", default="relu") == "relu" else "gelu"
    return read_facts(keys, linears, norm="layer", mlp=mlp, tied=True, learned_positions=rows)


def _opt(hidden: int, layers: int, heads: int) -> Config:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 50_272,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


OPT = Family(
    model_type="opt",
    read=_read,
    modules=Modules(
        embedding="model.decoder.embed_tokens",
        added=("model.decoder.embed_positions",),
        shared=(),
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
    ),
    aliases={
        "opt-125m": Alias("facebook/opt-125m", _opt(768, 12, 12)),
        "opt-1.3b": Alias("facebook/opt-1.3b", _opt(2048, 24, 32)),
        "opt-6.7b": Alias("facebook/opt-6.7b", _opt(4096, 32, 32)),
        "opt-13b": Alias("facebook/opt-13b", _opt(5120, 40, 40)),
        "opt-30b": Alias("facebook/opt-30b", _opt(7168, 48, 56)),
        "opt-66b": Alias("facebook/opt-66b", _opt(9216, 64, 72)),
    },
)
