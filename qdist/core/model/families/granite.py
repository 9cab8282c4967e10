"""Granite 3, dense: Llama's layer, with multipliers of embedding, attention, residual and logits."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, decoder_config, read_grouped
from qdist.core.model.shapes import ModelFacts


def _read(keys: Keys) -> ModelFacts:
    bias, mlp_bias = keys.flag("attention_bias", default=False), keys.flag("mlp_bias", default=False)
    return read_grouped(keys, bias=bias, mlp_bias=mlp_bias)


def _granite(hidden: int, inner: int, *, attention: float, logits: float) -> Config:
    return decoder_config(
        "granite", hidden, inner, 40, 32, 8, vocab=49_159, positions=131_072, theta=10_000_000.0, eps=1e-5, tied=True,
        bos=0, eos=0, pad_token_id=0, attention_multiplier=attention, embedding_multiplier=12.0,
        residual_multiplier=0.22, logits_scaling=logits,
    )  # fmt: skip


_TUNED: dict[str, Config] = {"instruct": {}}

GRANITE = Family(
    model_type="granite",
    read=_read,
    aliases={
        "granite-2b": Alias(
            "ibm-granite/granite-3.3-2b-instruct", _granite(2048, 8192, attention=0.015625, logits=8.0), _TUNED
        ),
        "granite-8b": Alias(
            "ibm-granite/granite-3.3-8b-instruct", _granite(4096, 12_800, attention=0.0078125, logits=16.0), _TUNED
        ),
    },
)
