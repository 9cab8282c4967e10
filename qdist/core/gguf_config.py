"""What config.json would a GGUF file's header make? The keys of llama.cpp under the names of transformers."""

from collections.abc import Collection, Mapping
from typing import Any

from qdist.core.errors import ModelError

_DECODER = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_WITH_HEADS = _DECODER | {"rope.dimension_count": "head_dim"}
KEYS: dict[str, dict[str, str]] = {
    "llama": _WITH_HEADS,
    "mistral": _WITH_HEADS,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
}
"""Architecture -> key behind its name -> key of config.json: those that transformers reads when it converts a file."""
_TOKENS = "tokenizer.ggml.tokens"


def config_of_header(
    metadata: Mapping[str, object], lengths: Mapping[str, int], tensors: Collection[str], *, name: str
) -> dict[str, Any]:
    """The shape that a header states, as a config.json.

    metadata: its keys with one value each. lengths: of its keys that hold an array, how long that is.
    tensors: names of all tensors of the model.
    Raises ModelError for an architecture that qdist does not read.
    """
    architecture = str(metadata.get("general.architecture"))
    if architecture not in KEYS:
        raise ModelError(
            f"{name} has architecture {architecture!r}, which qdist does not read from GGUF",
            try_=f"one of {', '.join(KEYS)}, or the model's own folder or hub id",
        )
    found = {key: metadata.get(f"{architecture}.{own}") for own, key in KEYS[architecture].items()}
    config = {key: value for key, value in found.items() if value is not None}
    if _TOKENS in lengths:
        config.setdefault("vocab_size", lengths[_TOKENS])
    return {"model_type": architecture, **config, "tie_word_embeddings": "output.weight" not in tensors}
