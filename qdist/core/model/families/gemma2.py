"""Gemma 2: four norms a layer, heads of a size of their own, caps on scores and logits."""

from qdist.core.model.config import Keys
from qdist.core.model.families.family import Alias, Config, Family, decoder_config, read_grouped
from qdist.core.model.shapes import ModelFacts


def _read(keys: Keys) -> ModelFacts:
    bias = keys.flag("attention_bias", default=False)
    # torch's fused attention leaves the cap on scores out, so transformers writes the scores out.
    attention = "flash" if keys.is_null("attn_logit_softcapping") else "eager"
    return read_grouped(keys, bias=bias, head_dim=256, norms=4, tied=True, attention=attention)


def _gemma2(hidden: int, inner: int, layers: int, heads: int, head_dim: int, scale: int) -> Config:
    return decoder_config(
        "gemma2", hidden, inner, layers, heads, heads // 2, vocab=256_000, positions=8192, tied=True, bos=2, eos=1,
        pad_token_id=0, head_dim=head_dim, query_pre_attn_scalar=scale, sliding_window=4096,
        hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip


_TUNED: dict[str, Config] = {"it": {}}

GEMMA2 = Family(
    model_type="gemma2",
    read=_read,
    measured=False,
    aliases={
        "gemma2-2b": Alias("google/gemma-2-2b", _gemma2(2304, 9216, 26, 8, 256, 256), _TUNED),
        "gemma2-9b": Alias("google/gemma-2-9b", _gemma2(3584, 14_336, 42, 16, 256, 256), _TUNED),
        "gemma2-27b": Alias("google/gemma-2-27b", _gemma2(4608, 36_864, 46, 32, 128, 144), _TUNED),
    },
)
