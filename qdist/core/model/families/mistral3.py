"""Mistral Small 3.1 and 3.2, Ministral 3: Mistral's decoder within a model of images and text; Ministral's alone."""

from typing import Any

from qdist.core.errors import ModelError
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

_DEFAULTS: dict[str, Config] = {
    "mistral": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
    },
    "ministral3": {
        "vocab_size": 131_072,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 34,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
    },
}
"""Those of transformers' classes, which a configuration within another may leave out."""
_VISION = {"patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
"""The tower where the config has none."""


def _of_text(keys: Keys) -> Keys:
    kind = keys.text("model_type", default="mistral")
    if kind not in _DEFAULTS:
        raise ModelError(
            f"{keys.name} has a decoder of model_type {kind!r}, which qdist does not know within mistral3",
            try_="a model whose text_config is of Mistral or Ministral 3",
        )
    return keys.over({"model_type": kind, **_DEFAULTS[kind]})


def _read_text(keys: Keys) -> ModelFacts:
    return read_grouped(_of_text(keys))


def _read(keys: Keys) -> ModelFacts:
    vision = keys.inner("vision_config")
    vision = vision if keys.states("vision_config") else vision.over(_VISION)
    width = vision.count("hidden_size", default=1024)
    hidden = _of_text(keys.inner("text_config")).count("hidden_size")
    bias = keys.flag("multimodal_projector_bias", default=False)
    layers = len(keys.counts("vision_feature_layer")) if keys.is_list("vision_feature_layer") else 1
    merger = width + keys.count("spatial_merge_size", default=2) ** 2 * width**2
    projector = merger + width * layers * hidden + hidden**2 + 2 * hidden * bias
    left_out = (
        towers.left_out("model.vision_tower", towers.pixtral(vision)),
        towers.left_out("model.multi_modal_projector", projector),
    )
    return read_wrapped(keys, _read_text, left_out, tied=True)


def _wrapped(text: Config, *, tied: bool = False) -> Config:
    return {
        "model_type": "mistral3",
        "text_config": text,
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "head_dim": 64,
            "image_size": 1540,
            "patch_size": 14,
        },
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 11,
    }


def _ministral3(hidden: int, inner: int, layers: int, **more: Any) -> Config:
    return decoder_config(
        "ministral3", hidden, inner, layers, 32, 8, vocab=131_072, positions=262_144, theta=1_000_000.0, eps=1e-5,
        head_dim=128, pad_token_id=11, **more,
    )  # fmt: skip


_SMALL = decoder_config(
    "mistral", 5120, 32_768, 40, 32, 8, vocab=131_072, positions=131_072, theta=1_000_000_000.0, eps=1e-5,
    head_dim=128, sliding_window=None,
)  # fmt: skip
_TUNED: dict[str, Config] = {"base": {}, "instruct": {}, "reasoning": {}}

MINISTRAL3 = Family(model_type="ministral3", read=_read_text, measured=False)
MISTRAL3 = Family(
    model_type="mistral3",
    read=_read,
    modules=WRAPPED,
    aliases={
        "mistral-small-24b": Alias(
            "mistralai/Mistral-Small-3.1-24B-Base-2503",
            _wrapped(_SMALL),
            _TUNED,
            also=("Mistral-Small-3.2-24B-Instruct-2506",),
        ),
        "ministral3-3b": Alias(
            "mistralai/Ministral-3-3B-Base-2512", _wrapped(_ministral3(3072, 9216, 26, tied=True), tied=True), _TUNED
        ),
        "ministral3-8b": Alias("mistralai/Ministral-3-8B-Base-2512", _wrapped(_ministral3(4096, 14_336, 34)), _TUNED),
        "ministral3-14b": Alias("mistralai/Ministral-3-14B-Base-2512", _wrapped(_ministral3(5120, 16_384, 40)), _TUNED),
    },
)
