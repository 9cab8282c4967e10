"""Arcee's AFM: Llama's layer, whose MLP has no gate and squares a ReLU."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Family, read_grouped
from qdist.core.model.shapes import ModelFacts


def _read(keys: Keys) -> ModelFacts:
    bias, mlp_bias = keys.flag("attention_bias", default=False), keys.flag("mlp_bias", default=False)
    return read_grouped(keys, bias=bias, mlp_bias=mlp_bias, gated=False, mlp="relu")


ARCEE = Family(model_type="arcee", read=_read, measured=False)
