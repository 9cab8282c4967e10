"""OLMo 3: OLMo 2's layer, three of four with a sliding window."""

from qdist.core.model.families.family import Alias, Config, Family, decoder_config
from qdist.core.model.families.olmo2 import OLMO2


def _olmo3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Config:
    rope = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    return decoder_config(
        "olmo3", hidden, inner, layers, heads, kv_heads, vocab=100_278, positions=65_536, theta=500_000.0,
        bos=None, eos=100_257, pad_token_id=100_277, rope_scaling=rope, sliding_window=4096,
    )  # fmt: skip


OLMO3 = Family(
    model_type="olmo3",
    read=OLMO2.read,
    measured=False,
    aliases={
        "olmo3-7b": Alias("allenai/Olmo-3-1025-7B", _olmo3(4096, 11_008, 32, 32, 32)),
        "olmo3-32b": Alias("allenai/Olmo-3-1125-32B", _olmo3(5120, 27_648, 64, 40, 8)),
    },
)
