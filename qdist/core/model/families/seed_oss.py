"""Seed-OSS: Llama's layer with biases on queries, keys and values."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Family, decoder_config, read_grouped
from qdist.core.model.shapes import ModelFacts


def _read(keys: Keys) -> ModelFacts:
    return read_grouped(
        keys,
        bias=keys.flag("attention_bias", default=True),
        out_bias=keys.flag("attention_out_bias", default=False),
        mlp_bias=keys.flag("mlp_bias", default=False),
        head_dim=128,
    )


_36B = decoder_config(
    "seed_oss", 5120, 27_648, 64, 80, 8, vocab=155_136, positions=524_288, theta=10_000_000.0, bos=0, eos=2,
    pad_token_id=1, head_dim=128, attention_bias=True, attention_out_bias=False, mlp_bias=False,
    attention_dropout=0.1, residual_dropout=0.1,
)  # fmt: skip

SEED_OSS = Family(
    model_type="seed_oss",
    read=_read,
    measured=False,
    aliases={"seed-oss-36b": Alias("ByteDance-Seed/Seed-OSS-36B-Instruct", _36B, {"instruct": {}, "base": {}})},
)
