"""Gemma 3: four norms a layer and two over heads; a text model alone, or within one of images and text."""

from typing import Any

from qdist.core.model.config import Keys
from qdist.core.model.families import towers
from qdist.core.model.families.family import (
    WRAPPED,
    Alias,
    Config,
    Family,
    decoder_config,
    read_grouped,
    read_wrapped,
)
from qdist.core.model.shapes import ModelFacts

_DEFAULTS = {
    "model_type": "gemma3_text",
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}
"""Those of transformers' class: published configurations of Gemma 3 leave such keys out."""


def _read_text(keys: Keys) -> ModelFacts:
    keys = keys.over(_DEFAULTS)
    bias = keys.flag("attention_bias", default=False)
    return read_grouped(keys, bias=bias, norms=4, qk_norm=True, tied=True)


def _read(keys: Keys) -> ModelFacts:
    vision = keys.inner("vision_config")
    width = vision.count("hidden_size", default=768)
    hidden = keys.inner("text_config").over(_DEFAULTS).count("hidden_size")
    left_out = (
        towers.left_out("model.vision_tower", towers.siglip(vision)),
        towers.left_out("model.multi_modal_projector", width * hidden + width),
    )
    return read_wrapped(keys, _read_text, left_out, tied=True)


def _text(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> Config:
    given: Config = {"vocab": 262_208, "positions": 131_072, "head_dim": 256, "query_pre_attn_scalar": 256, **more}
    return decoder_config(
        "gemma3_text", hidden, inner, layers, heads, kv_heads, theta=1_000_000.0, tied=True, bos=2, eos=1,
        pad_token_id=0, rope_local_base_freq=10_000.0, hidden_activation="gelu_pytorch_tanh", **given,
    )  # fmt: skip


def _gemma3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> Config:
    stretch = {"rope_type": "linear", "factor": 8.0}
    return {
        "model_type": "gemma3",
        "text_config": _text(hidden, inner, layers, heads, kv_heads, sliding_window=1024, rope_scaling=stretch, **more),
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
    }


def _small(hidden: int, inner: int, layers: int) -> Config:
    return _text(hidden, inner, layers, 4, 1, vocab=262_144, positions=32_768, sliding_window=512)


_TUNED: dict[str, Config] = {"pt": {}, "it": {}}

GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    read=_read_text,
    aliases={
        "gemma3-270m": Alias("google/gemma-3-270m", _small(640, 2048, 18), _TUNED),
        "gemma3-1b": Alias("google/gemma-3-1b-pt", _small(1152, 6912, 26), _TUNED),
    },
)
GEMMA3 = Family(
    model_type="gemma3",
    read=_read,
    modules=WRAPPED,
    aliases={
        "gemma3-4b": Alias("google/gemma-3-4b-pt", _gemma3(2560, 10_240, 34, 8, 4), _TUNED),
        "gemma3-12b": Alias("google/gemma-3-12b-pt", _gemma3(3840, 15_360, 48, 16, 8), _TUNED),
        "gemma3-27b": Alias(
            "google/gemma-3-27b-pt",
            _gemma3(5376, 21_504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168),
            _TUNED,
        ),
    },
)
