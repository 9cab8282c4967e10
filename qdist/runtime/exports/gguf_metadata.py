"""The keys of a GGUF file that say what the model is, and what its readers will not do as transformers does."""

from collections.abc import Mapping
from typing import Any

import gguf

from qdist.core.facts import ModelFacts
from qdist.runtime.exports.gguf_blocks import Kind
from qdist.runtime.exports.gguf_rope import Rope

_FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}
_EPSILON = 1e-6
"""What transformers' Llama, Mistral and Qwen configurations default to."""


def add_metadata(writer: Any, facts: ModelFacts, rope: Rope, config: Mapping[str, Any], kind: Kind) -> None:
    """Everything about the model but its tensors and its vocabulary.

    The length of keys and values is always said: readers take hidden / heads otherwise, which newer models are not.
    """
    writer.add_type("model")
    writer.add_name(facts.name)
    writer.add_file_type(int(_FILE_TYPES[kind]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(facts.layers)
    writer.add_context_length(facts.max_positions)
    writer.add_embedding_length(facts.hidden)
    writer.add_feed_forward_length(facts.intermediate)
    writer.add_head_count(facts.heads)
    writer.add_head_count_kv(facts.kv_heads)
    writer.add_key_length(facts.head_dim)
    writer.add_value_length(facts.head_dim)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps") or _EPSILON))
    writer.add_vocab_size(facts.vocab)
    _add_rope(writer, facts, rope)


def _add_rope(writer: Any, facts: ModelFacts, rope: Rope) -> None:
    """llama3's scaling is a tensor, so that no key says it."""
    writer.add_rope_dimension_count(facts.head_dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_positions)


def model_notes(facts: ModelFacts, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Where llama.cpp computes something else than transformers."""
    window = config.get("sliding_window")
    windowed = facts.family == "mistral" or config.get("use_sliding_window")
    if window and windowed and window < facts.max_positions:
        return (f"llama.cpp attends to the whole context, the model to its last {window} tokens",)
    return ()
