"""GPT-NeoX and Pythia: rotary positions, attention and MLP side by side."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, fused_linears, read_facts
from qdist.core.model.shapes import ModelFacts, Modules


def _read(keys: Keys) -> ModelFacts:
    bias = keys.flag("attention_bias", default=True)
    linears = fused_linears(keys.count("hidden_size"), keys.count("intermediate_size"), bias)
    return read_facts(keys, linears, norm="layer", mlp="gelu", attention="repacked")


def _pythia(hidden: int, layers: int, heads: int, vocab: int) -> Config:
    return {
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


_DEDUPED: dict[str, Config] = {"deduped": {}}

GPT_NEOX = Family(
    model_type="gpt_neox",
    read=_read,
    modules=Modules(
        embedding="gpt_neox.embed_in",
        before=("gpt_neox.emb_dropout",),
        shared=("gpt_neox.rotary_emb",),
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
    ),
    aliases={
        "pythia-160m": Alias("EleutherAI/pythia-160m", _pythia(768, 12, 12, 50_304), _DEDUPED),
        "pythia-1.4b": Alias("EleutherAI/pythia-1.4b", _pythia(2048, 24, 16, 50_304), _DEDUPED),
        "pythia-6.9b": Alias("EleutherAI/pythia-6.9b", _pythia(4096, 32, 32, 50_432), _DEDUPED),
        "pythia-12b": Alias("EleutherAI/pythia-12b", _pythia(5120, 36, 40, 50_688), _DEDUPED),
    },
)
