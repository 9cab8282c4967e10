"""GGUF metadata keys that describe the model, including rotary positions, and what readers will not do."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import gguf
import torch

from qdist.core.errors import ModelError
from qdist.core.model.families import FAMILIES
from qdist.core.model.families.family import Gguf
from qdist.core.model.shapes import ModelFacts
from qdist.runtime.exports.gguf.blocks import Kind
from qdist.runtime.exports.gguf.quantizer import MIXTURES

_DEFAULTS = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True,
             "beta_fast": 32, "beta_slow": 1}  # fmt: skip
"""llama.cpp's YaRN constants, which no key of a file changes for these architectures."""


def gguf_of(facts: ModelFacts) -> Gguf:
    """llama.cpp's description of a model's family, which must have one."""
    found = FAMILIES[facts.family].gguf
    assert found is not None
    return found


class Rope(NamedTuple):
    """Parameters of rotary position embeddings."""

    theta: float
    type: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_positions: int = 0
    """Positions before scaling (yarn, llama3)."""
    low: float = 1.0
    high: float = 4.0
    """llama3's low_freq_factor and high_freq_factor."""


def rope_of(config: Mapping[str, Any], *, name: str) -> Rope:
    """Rotary parameters of a config.json. Raises ModelError for scalings that a GGUF file cannot describe."""
    said = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = float(said.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = str(said.get("rope_type") or said.get("type") or "default")
    rotated = said.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if rotated != 1:
        raise ModelError(f"{name} rotates {rotated} of each head, and GGUF readers all of it", try_="a merged folder")
    if kind == "default":
        return Rope(theta)
    if kind not in ("linear", "yarn", "llama3"):
        raise ModelError(
            f"{name} scales its positions by {kind!r}; GGUF is written for linear, yarn and llama3",
            try_="a merged folder",
        )
    changed = [key for key, value in _DEFAULTS.items() if said.get(key, value) not in (value, None)]
    if kind == "yarn" and changed:
        raise ModelError(
            f"{name} has yarn with {changed[0]} = {said[changed[0]]}, which a GGUF file cannot say",
            try_="a merged folder",
        )
    try:
        return _scaled(theta, kind, said, config)
    except KeyError as error:
        raise ModelError(
            f"{name} scales its positions by {kind!r} and does not say {error.args[0]}", try_="its published config"
        ) from None


def _scaled(theta: float, kind: Any, said: Mapping[str, Any], config: Mapping[str, Any]) -> Rope:
    if kind == "linear":
        return Rope(theta, kind, float(said["factor"]))
    original = said.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind == "yarn":
        return Rope(theta, kind, float(said["factor"]), int(original or config["max_position_embeddings"]))
    if not original:
        raise KeyError("original_max_position_embeddings")
    low, high = float(said["low_freq_factor"]), float(said["high_freq_factor"])
    return Rope(theta, kind, float(said["factor"]), int(original), low, high)


def rope_factors(rope: Rope, head_dim: int) -> torch.Tensor | None:
    """Divisor of each frequency, float32 [head_dim / 2]; None if all are divided alike.

    Llama 3.1's rule: wavelengths below original / high stay, those above original / low are stretched by the factor,
    between them the frequency is a mean of both, weighted by where original / wavelength lies between low and high.
    """
    if rope.type != "llama3":
        return None
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * rope.theta**exponents
    kept = (rope.original_positions / wavelengths - rope.low) / (rope.high - rope.low)
    kept = kept.clamp(0, 1)
    return (1 / (kept + (1 - kept) / rope.factor)).to(torch.float32)


_FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    **{kind: mixture.file for kind, mixture in MIXTURES.items()},
}
_EPSILON = 1e-6
"""Default norm epsilon of transformers' Llama, Mistral and Qwen configurations."""


def add_metadata(writer: Any, facts: ModelFacts, rope: Rope, config: Mapping[str, Any], kind: Kind) -> None:
    """Add all keys about the model except its tensors and vocabulary.

    The length of keys and values is always stated: readers default to hidden / heads, which newer models do not use.
    """
    writer.add_type("model")
    writer.add_name(facts.name)
    writer.add_file_type(int(_FILE_TYPES[kind]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    (shape,) = facts.shapes  # these architectures have layers of one kind
    writer.add_block_count(facts.layer_count)
    writer.add_context_length(facts.max_positions)
    writer.add_embedding_length(facts.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps") or _EPSILON))
    writer.add_vocab_size(facts.vocab)
    _add_rope(writer, facts, rope)


def _add_rope(writer: Any, facts: ModelFacts, rope: Rope) -> None:
    """Add the rotary keys; llama3's scaling is a tensor instead."""
    writer.add_rope_dimension_count(facts.shapes[0].head_dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_positions)


def model_notes(facts: ModelFacts, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on where llama.cpp computes something other than transformers."""
    window = config.get("sliding_window")
    windowed = gguf_of(facts).windowed or config.get("use_sliding_window")
    if window and windowed and window < facts.max_positions:
        return (f"llama.cpp attends to the whole context, the model to its last {window} tokens",)
    return ()
