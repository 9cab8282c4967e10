"""Command R7B: attention and MLP side by side behind one norm, which has no shift."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Family, decoder_config, read_grouped
from qdist.core.model.shapes import ModelFacts


def _read(keys: Keys) -> ModelFacts:
    return read_grouped(keys, bias=keys.flag("attention_bias", default=False), norms=1, tied=True)


_R7B = decoder_config(
    "cohere2", 4096, 14_336, 32, 32, 8, vocab=256_000, positions=132_096, theta=50_000.0, tied=True,
    bos=5, eos=255_001, pad_token_id=0, layer_norm_eps=1e-5, logit_scale=0.25, sliding_window=4096,
)  # fmt: skip

COHERE2 = Family(
    model_type="cohere2",
    read=_read,
    measured=False,
    aliases={"command-r7b": Alias("CohereLabs/c4ai-command-r7b-12-2024", _R7B)},
)
