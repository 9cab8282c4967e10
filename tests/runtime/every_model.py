"""A configuration of any model type of transformers, shrunk until a model of it is made in a moment."""

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

VOCAB = 320
LAYERS = 4
_SIZES: tuple[tuple[str, int], ...] = (
    # Key of a config.json, wholly matched -> its size; the first pattern wins.
    (r"vocab_size|padded_vocab_size|ctc_vocab_size", VOCAB),
    (
        r"num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|"
        r"num_encoder_layers|num_decoder_layers|depth",
        LAYERS,
    ),
    (
        r"hidden_size|d_model|n_embd|n_embed|dim|embed_dim|embedding_size|encoder_hidden_size|"
        r"word_embed_proj_dim|emb_dim|hidden_dim|embed_proj_dim|attention_hidden_size|lru_width|"
        r"linear_attn_hidden_size",
        64,
    ),
    (r"num_attention_heads|n_heads?|encoder_attention_heads|decoder_attention_heads|num_heads|attention_heads", 4),
    (r"num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|num_global_key_value_heads", 2),
    (
        r"head_dim|attention_head_dim|v_head_dim|kv_channels|d_kv|global_head_dim|"
        r"attention_key_size|qk_nope_head_dim|mamba_headdim|mamba_d_head|mamba_head_dim|d_head",
        16,
    ),
    (r"qk_rope_head_dim|rotary_dim|rope_head_dim", 8),
    (r"q_lora_rank|kv_lora_rank|index_head_dim", 32),
    (
        r"(.*_)?intermediate_size(_mlp)?|n_inner|ffn_dim|d_ff|ffn_hidden_size|encoder_ffn_dim|"
        r"decoder_ffn_dim|d_inner|moe_ffn_hidden_size|inner_dim|dim_ff|mlp_dim",
        128,
    ),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_?k_experts|num_selected_experts|moe_topk", 2),
    (
        r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|"
        r"moe_num_shared_experts|first_k_dense_replace|num_zero_experts|zero_expert_num",
        1,
    ),
    (r"linear_num_key_heads|linear_num_value_heads|num_linear_heads", 2),
    (r"linear_key_head_dim|linear_value_head_dim", 16),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|mamba_heads", 8),
    (r"mamba_d_state|ssm_state_size|state_size|mamba_d_ssm|ssm_state", 16),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|"
        r"max_sequence_length|seq_length|max_source_positions|max_target_positions|"
        r"original_max_position_embeddings",
        128,
    ),
    (r"image_size|img_size", 32),
    (r"patch_size", 8),
    (r"vocab_size_per_layer_input", VOCAB),
    (r"hidden_size_per_layer_input", 16),
    (r"num_kv_shared_layers", 2),
    (r"sliding_window|attention_chunk_size|local_attention|attention_window_size", 8),
)


_ZERO_AT_FIRST = ("e_score_correction_bias", "correct_output_scale")
"""Buffers and parameters that are zeros in a new model, which no checkpoint has."""
_DRAFTER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16, "vocab_size": VOCAB,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    # What a type's own validation asks for beside the sizes, and what published models have unlike its defaults.
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "gemma4_assistant": {"text_config": _DRAFTER | {"model_type": "gemma4_text"}},
    "gemma4_unified_assistant": {"text_config": _DRAFTER | {"model_type": "gemma4_unified_text"}},
    "longcat_flash": {"head_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "cohere_compass_text": {
        "head_dim": 128,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "topk_group": 1,
        "n_group": 1,
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 4}},
    "emu3": {"vocabulary_map": {"<image>": 300, "<|extra_200|>": 301, "<|visual token 000000|>": 302}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "zamba": {
        "num_hidden_layers": 8,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": [*["linear_attention"] * 2, "hybrid", *["linear_attention"] * 4, "hybrid"],
    },
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_chunk_size": 16},
    "gemma4_text": {"global_head_dim": 32},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}},
    "granite": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "inkling_text": {"n_routed_experts": 128},  # as many as leave the shared ones, which are not packed, below 1 %
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "ministral": {"head_dim": 16},
    "modernbert-decoder": {"cls_token_id": 1, "sep_token_id": 2},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "feed_forward_size": 128,
    },
    "youtu": {"pad_token_id": 1},  # the tokenizer's: its class zeroes that row of weights that it loads
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [2, 4],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}


_MUSIC = {kind: {"model_type": own} for kind, own in (("text_encoder", "t5"), ("audio_encoder", "encodec"))}
_REQUIRED: dict[str, dict[str, Any]] = {
    # What a type's class asks for even for a default configuration.
    "musicgen": {**_MUSIC, "decoder": {"model_type": "musicgen_decoder"}},
    "musicgen_melody": {**_MUSIC, "decoder": {"model_type": "musicgen_melody_decoder"}},
}


def tiny_arguments(model_type: str, default: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the configuration class of a model type. default: its configuration without any."""
    found = shrunk(default)
    for key, value in _OWN.get(model_type, {}).items():
        found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    return found


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a default configuration with small sizes: arguments for its class."""
    found: dict[str, Any] = {}
    layers = next(
        (config[key] for key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") if config.get(key)), 0
    )
    for key, value in config.items():
        if key == "per_layer_config":
            continue  # made by the class of what else it is given, such as Gemma 4's second width of heads
        if isinstance(value, Mapping) and key.endswith(("config", "_config")):
            found[key] = tiny_arguments(str(value.get("model_type", "")), value)
        elif isinstance(value, list) and layers and len(value) == layers and key != "architectures":
            found[key] = _sample(value)
        elif isinstance(value, bool) or not isinstance(value, int | None):
            continue
        elif key.endswith(("token_id", "token_index")) or re.fullmatch(
            r"(pad|bos|eos|sep|cls|mask)_?idx|padding_idx", key
        ):
            found[key] = (
                value if value is None or value < VOCAB - 8 else (VOCAB - 1 if "image" in key or "audio" in key else 2)
            )
        elif isinstance(value, int):
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, key)), None)
            if size is not None:
                found[key] = size
    if "qk_rope_head_dim" in found:
        found.pop("head_dim", None)  # latent attention: derived from the parts of a head
        found |= {"num_key_value_heads": 4} if "num_key_value_heads" in config else {}
    return found


def _sample(values: list[Any]) -> list[Any]:
    """As many values as a tiny model has layers, each kind among them, the last at the end."""
    kinds = [value for index, value in enumerate(values) if value not in values[:index]]
    picked = (kinds * LAYERS)[: LAYERS - 1]
    return [*picked, values[-1]]


def tiny_config(model_type: str, **changes: Any) -> Any:
    """transformers' configuration of a tiny model. Raises whatever transformers raises. changes: to its sizes."""
    from transformers import AutoConfig

    if model_type in _REQUIRED:
        return AutoConfig.for_model(model_type, **deepcopy(_REQUIRED[model_type]) | changes)
    arguments = tiny_arguments(model_type, AutoConfig.for_model(model_type).to_dict())
    return AutoConfig.for_model(model_type, **arguments | changes)


def tiny_model(model_type: str, **changes: Any) -> Any:
    """A random float32 model of the type's own class. Raises whatever transformers raises. changes: to its sizes."""
    import torch

    from qdist.runtime.model.classes import class_of

    config = tiny_config(model_type, **changes)
    torch.manual_seed(0)
    model = class_of(config).from_config(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(_ZERO_AT_FIRST):
            buffer.uniform_(0.0, 0.1)  # zero at first, so that one which is lost would not show
    for name, parameter in model.named_parameters():
        if not parameter.any() and not name.endswith("bias"):
            parameter.data.normal_(std=0.02)  # zero at first, and behind it nothing would have a gradient
    return model
