"""Mistral 7B: Llama's layer without biases, whatever the config says."""

from qdist.core.model.families.family import (
    HEADER_KEYS_WITH_HEADS,
    Alias,
    Family,
    Gguf,
    decoder_config,
    read_grouped,
)

_MISTRAL = decoder_config(
    "mistral", 4096, 14_336, 32, 32, 8, vocab=32_768, positions=32_768, theta=1_000_000.0, eps=1e-5,
    head_dim=128, sliding_window=None,
)  # fmt: skip

MISTRAL = Family(
    model_type="mistral",
    read=read_grouped,
    gguf=Gguf("llama", interleaved=True, windowed=True, header_keys=HEADER_KEYS_WITH_HEADS),
    aliases={"mistral-7b": Alias("mistralai/Mistral-7B-v0.3", _MISTRAL, {"instruct": {}})},
)
