"""Baichuan 1 and 2, from the code in their repositories: Llama's layer with q, k, v in W_pack."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, read_facts
from qdist.core.model.shapes import Linear, ModelFacts, Modules


def _read(keys: Keys) -> ModelFacts:
    """As in vLLM, the width distinguishes the 7B models, with rotary positions, from the 13B ones, with ALiBi."""
    hidden, inner = keys.count("hidden_size"), keys.count("intermediate_size")
    linears = (
        Linear("W_pack", hidden, 3 * hidden, False, "attention_in"),
        Linear("o_proj", hidden, hidden, False, "attention_out"),
        Linear("gate_proj", hidden, inner, False, "mlp_in"),
        Linear("up_proj", hidden, inner, False, "mlp_in"),
        Linear("down_proj", inner, hidden, False, "mlp_out"),
    )
    return read_facts(keys, linears, attention="flash" if hidden == 4096 else "eager")


def _baichuan(hidden: int, inner: int, layers: int, heads: int, vocab: int, *, alibi: bool) -> Config:
    """The 13B models have ALiBi and name their length `model_max_length`."""
    return {
        "model_type": "baichuan",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "model_max_length" if alibi else "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


_TUNED: dict[str, Config] = {"base": {}, "chat": {}}

BAICHUAN = Family(
    model_type="baichuan",
    read=_read,
    modules=Modules(shared=()),
    own_code=True,
    aliases={
        "baichuan-7b": Alias("baichuan-inc/Baichuan-7B", _baichuan(4096, 11_008, 32, 32, 64_000, alibi=False), _TUNED),
        "baichuan-13b": Alias(
            "baichuan-inc/Baichuan-13B-Base", _baichuan(5120, 13_696, 40, 40, 64_000, alibi=True), _TUNED
        ),
        "baichuan2-7b": Alias(
            "baichuan-inc/Baichuan2-7B-Base", _baichuan(4096, 11_008, 32, 32, 125_696, alibi=False), _TUNED
        ),
        "baichuan2-13b": Alias(
            "baichuan-inc/Baichuan2-13B-Base", _baichuan(5120, 13_696, 40, 40, 125_696, alibi=True), _TUNED
        ),
    },
)
