"""GLM-4: gate and up in one linear, half of each head rotated; `glm4` adds norms behind attention and MLP."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Family, decoder_config, read_grouped
from qdist.core.model.shapes import ModelFacts


def _read(keys: Keys, norms: int = 2) -> ModelFacts:
    bias = keys.flag("attention_bias", default=True)
    return read_grouped(
        keys, bias=bias, out_bias=False, head_dim=128, fused_gate=True, norms=norms, attention="repacked"
    )


def _read_glm4(keys: Keys) -> ModelFacts:
    return _read(keys, norms=4)


_GLM4_9B = decoder_config(
    "glm", 4096, 13_696, 40, 32, 2, vocab=151_552, positions=8192, eps=1.5625e-7, head_dim=128,
    attention_bias=True, partial_rotary_factor=0.5, pad_token_id=151_329,
    bos=None, eos=[151_329, 151_336, 151_338],
)  # fmt: skip

GLM = Family(model_type="glm", read=_read, aliases={"glm-4-9b": Alias("THUDM/glm-4-9b-hf", _GLM4_9B)})
GLM4 = Family(model_type="glm4", read=_read_glm4)
