"""OLMo 2: Llama's layer with its norms behind attention and MLP, and a norm over all queries and over all keys."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, Gguf, decoder_config, read_grouped
from qdist.core.model.shapes import ModelFacts


def _read(keys: Keys) -> ModelFacts:
    return read_grouped(keys, bias=keys.flag("attention_bias", default=False), qk_norm="whole")


def _refuse(facts: ModelFacts) -> str:
    (shape,) = facts.shapes
    if any(linear.bias for linear in shape.linears):
        return "has attention_bias, and llama.cpp reads OLMo 2 without"
    if facts.tied_embeddings:
        return "has tied embeddings, and llama.cpp reads OLMo 2 with a head of its own"
    width = shape.heads * shape.head_dim
    like_hidden = f"has heads of {width} in all, and llama.cpp reads OLMo 2 with {facts.hidden} like its hidden size"
    return "" if width == facts.hidden else like_hidden


def _olmo2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Config:
    return decoder_config(
        "olmo2", hidden, inner, layers, heads, kv_heads, vocab=100_352, positions=4096, theta=500_000.0,
        bos=None, eos=100_257, pad_token_id=100_277,
    )  # fmt: skip


_TUNED: dict[str, Config] = {"instruct": {}, "sft": {}, "dpo": {}}

OLMO2 = Family(
    model_type="olmo2",
    read=_read,
    gguf=Gguf(  # transformers 5.17 does not convert such files back
        "olmo2", norms=("post_attention_layernorm", "post_feedforward_layernorm"), refusal=_refuse, header_keys={}
    ),
    aliases={
        "olmo2-1b": Alias("allenai/OLMo-2-0425-1B", _olmo2(2048, 8192, 16, 16, 16), _TUNED),
        "olmo2-7b": Alias("allenai/OLMo-2-1124-7B", _olmo2(4096, 11_008, 32, 32, 32), _TUNED),
        "olmo2-13b": Alias("allenai/OLMo-2-1124-13B", _olmo2(5120, 13_824, 40, 40, 40), _TUNED),
        "olmo2-32b": Alias("allenai/OLMo-2-0325-32B", _olmo2(5120, 27_648, 64, 40, 8), _TUNED),
    },
)
