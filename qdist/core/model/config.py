"""Reads a config.json, each key of the kind that it must be, and makes one from the header of a GGUF file."""

from collections.abc import Collection, Mapping
from typing import Any

from qdist.core.errors import ModelError

_PUBLISHED = "its published config.json"


class Keys:
    """Typed look-ups in a config. A key may have several spellings, of which an error names the first."""

    def __init__(self, config: Mapping[str, object], name: str) -> None:
        self._config, self.name = config, name

    def count(self, *spellings: str, default: int | None = None, most: int = 10**8) -> int:
        """A number of things; `most` is what no model has."""
        value = self._first(spellings, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self._wrong(spellings[0], value, f"a whole number from 1 to {most:,}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._first((key,), default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        return str(self._first((key,), default))

    def _wrong(self, key: str, value: object, wanted: str) -> ModelError:
        shown = repr(value) if len(repr(value)) < 40 else f"{repr(value)[:36]}..."
        return ModelError(f"{self.name}: config.json has {key} = {shown}; it must be {wanted}", try_=_PUBLISHED)

    def states(self, key: str) -> bool:
        return self._config.get(key) is not None

    def divides(self, parts: str, count: int, whole: str, size: int) -> None:
        """Raise ModelError where a size of the configuration is no multiple of another."""
        if size % count:
            raise ModelError(
                f"{self.name}: config.json has {whole} = {size}, which is no multiple of {parts} = {count}",
                try_=_PUBLISHED,
            )

    def _first(self, spellings: tuple[str, ...], default: object) -> object:
        value = next((self._config[key] for key in spellings if self._config.get(key) is not None), default)
        if value is None:
            raise ModelError(f"{self.name}: config.json has no {spellings[0]}", try_=_PUBLISHED)
        return value


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
