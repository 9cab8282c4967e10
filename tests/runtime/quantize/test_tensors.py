"""Every tensor of a checkpoint in the hub's names is read as transformers would make it, without loading the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.runtime.model.classes import class_of, empty_model
from qdist.runtime.quantize.blueprint import Blueprint
from qdist.runtime.quantize.tensors import StreamedTensors, streamed

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN35: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen3_moe": {**_COMMON, **_MOE},
    "qwen2_moe": {**_COMMON, **_MOE, "shared_expert_intermediate_size": 24},
    "mixtral": {**_COMMON, "num_local_experts": 4},
    "phimoe": {**_COMMON, "num_local_experts": 4},
    "deepseek_v3": {**_COMMON, **_MOE, **_MLA, "num_key_value_heads": 4},
    "glm4_moe": {**_COMMON, **_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gpt_oss": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {
        **_COMMON,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "gpt_neox": _COMMON,
    "gpt2": {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen3_5": {"text_config": {**_COMMON, **_QWEN35}, "vision_config": {"depth": 1, **_VISION, "num_heads": 2}},
    "gemma3": {"text_config": _COMMON, "vision_config": {"model_type": "siglip_vision_model", **_VISION}},
    "mistral3": {
        "text_config": {"model_type": "mistral", **_COMMON},
        "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 16},
    },
}


def config_of(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**MODELS[family], **changes})


def whole_model(config: Any, *, dtype: torch.dtype = torch.float32) -> Any:
    """The class with random weights, none of them constant."""
    torch.manual_seed(0)
    model = class_of(config).from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def outline_of(config: Any) -> Blueprint:
    """A blueprint of everything in a class, of which nothing is packed."""
    model = empty_model(config, whole=True)
    tied = set(model.all_tied_weights_keys)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    return Blueprint(config, type(model).__name__, model.base_model_prefix, 2, shapes, frozenset(), None, model)


def read_streamed(folder: Path, config: Any) -> tuple[Blueprint, StreamedTensors]:
    shape = outline_of(config)
    tensors = streamed(folder, shape)
    assert tensors is not None, "it would be loaded whole"
    return shape, tensors


@pytest.mark.parametrize("family", MODELS)
def test_each_tensor_is_streamed_as_the_model_holds_it(tmp_path: Path, family: str) -> None:
    model = whole_model(config_of(family))
    model.save_pretrained(tmp_path)
    shape, tensors = read_streamed(tmp_path, config_of(family))
    held = model.state_dict()
    assert [name for name in shape.shapes if not torch.equal(tensors.read(name), held[name])] == []
    assert {tensors.dtype(name) for name in shape.shapes if held[name].is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_are_read_a_matrix_at_a_time(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = whole_model(config_of(family))
    model.save_pretrained(tmp_path)
    shape, tensors = read_streamed(tmp_path, config_of(family))
    made: list[int] = []
    make = StreamedTensors._make
    monkeypatch.setattr(StreamedTensors, "_make", lambda *args: made.append(len(value := make(*args))) or value)
    names = [name for name, size in shape.shapes.items() if len(size) == 3]
    assert names
    for name in names:
        assert torch.equal(torch.stack(list(tensors.matrices(name))), model.state_dict()[name])
    assert set(made) == ({4} if family == "gpt_oss" else {1})  # gpt-oss stores a layer's in one tensor


def test_a_layer_that_predicts_tokens_ahead_is_left_out_and_one_too_many_is_refused(tmp_path: Path) -> None:
    from qdist.core.errors import ModelError

    config = config_of("qwen3_moe", num_hidden_layers=3)
    whole_model(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json says 2 layers, the files hold 3"):
        streamed(tmp_path, outline_of(config_of("qwen3_moe")))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_fp8_is_dequantized_while_it_is_read(tmp_path: Path, family: str) -> None:
    """In blocks of 16 x 16, each expert with scales of its own; transformers' own reading is the judge."""
    from safetensors.torch import load_file, save_file

    small = {**_COMMON, **_MOE, "moe_intermediate_size": 32, "intermediate_size": 64}
    config = config_of(family, **small)
    whole_model(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in [name for name in stored if "proj" in name]:
        rows, columns = (size // 16 for size in stored[name].shape)
        stored[f"{name}_scale_inv"] = torch.rand(rows, columns) + 0.5
        stored[name] = stored[name].to(torch.float8_e4m3fn)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"quantization_config": quantization}))
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    config.dtype = torch.bfloat16
    shape = outline_of(config)._replace(fp8=quantization)
    tensors = streamed(tmp_path, shape)
    assert tensors is not None
    assert [name for name in shape.shapes if not torch.equal(tensors.read(name), theirs[name])] == []
    assert {tensors.dtype(name) for name in shape.shapes} == {torch.bfloat16}
