"""SmolLM3: Llama's layer, of which every fourth does not rotate its queries and keys."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Family, decoder_config, read_grouped
from qdist.core.model.shapes import ModelFacts


def _read(keys: Keys) -> ModelFacts:
    bias, mlp_bias = keys.flag("attention_bias", default=False), keys.flag("mlp_bias", default=False)
    return read_grouped(keys, bias=bias, mlp_bias=mlp_bias, tied=True)


_SMOLLM3 = decoder_config(
    "smollm3", 2048, 11_008, 36, 16, 4, vocab=128_256, positions=65_536, theta=5_000_000.0, tied=True,
    bos=128_000, eos=128_012, pad_token_id=128_004, no_rope_layer_interval=4,
)  # fmt: skip

SMOLLM3 = Family(
    model_type="smollm3",
    read=_read,
    measured=False,
    aliases={"smollm3-3b": Alias("HuggingFaceTB/SmolLM3-3B", _SMOLLM3, {"base": {"eos_token_id": 128_001}})},
)
