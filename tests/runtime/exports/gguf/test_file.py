from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from qdist.core.errors import ModelError
from qdist.runtime.exports.gguf.blocks import dense, row_order
from qdist.runtime.exports.gguf.export import check_gguf
from qdist.runtime.exports.gguf.file import Affine, Kind
from qdist.runtime.exports.gguf.metadata import Rope, rope_factors
from tests.runtime.gguf_models import (
    ERRORS,
    EXACT,
    FAMILIES,
    KINDS,
    config_of,
    difference,
    fields,
    model_of,
    read_back,
    rounded,
    tensors_of,
    written,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_read_back_gives_its_logits(family: str, kind: Kind, tmp_path: Path) -> None:
    model = model_of(family)
    out, tensors, report = written(tmp_path, model, kind)
    assert difference(rounded(model, kind), read_back(out)) < EXACT
    assert difference(model, read_back(out)) < 0.1
    assert check_gguf(out, tensors, config=config_of(model), kind=kind) < ERRORS[kind]
    assert report.path == out
    assert report.bytes == out.stat().st_size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_model_has_no_head(family: str, tmp_path: Path) -> None:
    model = model_of(family, tie_word_embeddings=True)
    tensors = tensors_of(model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    out, _, _ = written(tmp_path, model, tensors=tensors)
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(out).tensors}
    assert difference(rounded(model, "f16"), read_back(out)) < EXACT


@pytest.mark.parametrize(("family", "heads", "kv_heads", "head_dim"), [("llama", 4, 4, 32), ("mistral", 8, 1, 16)])
def test_heads_need_not_fill_the_hidden_size(
    family: str, heads: int, kv_heads: int, head_dim: int, tmp_path: Path
) -> None:
    model = model_of(family, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    out, _, _ = written(tmp_path, model, "q4_1")
    assert difference(rounded(model, "q4_1"), read_back(out)) < EXACT
    assert fields(out)["llama.attention.key_length"] == head_dim


def test_mistral_is_written_as_llama(tmp_path: Path) -> None:
    out, _, report = written(tmp_path, model_of("mistral", sliding_window=64))
    assert fields(out)["general.architecture"] == "llama"
    assert any("last 64 tokens" in note for note in report.notes)


def test_biases_of_a_llama_are_permuted_with_its_rows(tmp_path: Path) -> None:
    model = model_of("llama", attention_bias=True, mlp_bias=True)
    out, tensors, _ = written(tmp_path, model)
    # transformers' reader does not look for these biases without a configuration that has them
    assert difference(rounded(model, "f16"), read_back(out, model.config)) < EXACT
    assert check_gguf(out, tensors, config=config_of(model), kind="f16") < ERRORS["f16"]


def test_halves_of_a_head_alternate() -> None:
    assert row_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert row_order(3, 0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_values_and_scales_of_q4_1_are_kept_bit_for_bit(group_size: int, tmp_path: Path) -> None:
    model = model_of("qwen2", hidden_size=128, intermediate_size=256)
    tensors = tensors_of(model, "q4_1", group_size=group_size)
    out, _, report = written(tmp_path, model, "q4_1", tensors=tensors)
    assert report.tensors["Q4_1"] == 14
    stored = next(tensor for tensor in gguf.GGUFReader(out).tensors if tensor.name == "blk.1.ffn_down.weight")
    affine: Affine = tensors["model.layers.1.mlp.down_proj.weight"][1]()
    blocks = np.asarray(stored.data).reshape(128, -1, 20)
    scales = blocks[:, :, :2].copy().view(np.float16)[:, :, 0]
    minimums = blocks[:, :, 2:4].copy().view(np.float16)[:, :, 0]
    repeats = group_size // 32
    assert (scales == affine.scales.t().repeat_interleave(repeats, 1).numpy()).all()
    assert (minimums == affine.minimums.half().t().repeat_interleave(repeats, 1).numpy()).all()
    for place in range(32):
        byte = blocks[:, :, 4 + place % 16]
        assert ((byte >> (4 * (place // 16)) & 15) == affine.values[:, place::32].numpy()).all()


def test_rows_that_blocks_do_not_fill_stay_fp16(tmp_path: Path) -> None:
    model = model_of("qwen2", hidden_size=48, intermediate_size=64)
    out, _, report = written(tmp_path, model, "q8_0")
    assert report.tensors == {"F16": 14, "F32": 11, "Q8_0": 2}  # down_proj alone has rows of 64
    assert difference(rounded(model, "q8_0"), read_back(out)) < EXACT


def test_affine_linears_become_weights_in_other_kinds(tmp_path: Path) -> None:
    model = model_of("llama")
    tensors = tensors_of(model, "q4_1")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        model.get_parameter(name).data.copy_(dense(tensors[name][1]()))
    out, _, _ = written(tmp_path, model, "f16", tensors=tensors)
    assert difference(rounded(model, "f16"), read_back(out)) < EXACT
    assert check_gguf(out, tensors, config=config_of(model), kind="f16") < ERRORS["f16"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_float_is_taken(dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of("llama")
    model.load_state_dict({name: value.to(dtype).float() for name, value in model.state_dict().items()})
    tensors = {name: (shape, lambda make=make: make().to(dtype)) for name, (shape, make) in tensors_of(model).items()}
    out, _, _ = written(tmp_path, model, tensors=tensors)
    assert difference(rounded(model, "f16"), read_back(out)) < EXACT


def test_readers_learn_the_shape_of_the_model(tmp_path: Path) -> None:
    out, _, _ = written(
        tmp_path, model_of("qwen3", rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "q8_0"
    )
    found = fields(out)
    expected = {
        "general.architecture": "qwen3", "general.name": "tiny", "general.file_type": 7,
        "general.quantization_version": 2, "qwen3.block_count": 2, "qwen3.context_length": 128,
        "qwen3.embedding_length": 64, "qwen3.feed_forward_length": 128, "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2, "qwen3.attention.key_length": 128, "qwen3.attention.value_length": 128,
        "qwen3.rope.dimension_count": 128, "qwen3.rope.freq_base": 5e5, "qwen3.vocab_size": 320,
        "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected


# Rotary positions


@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_llama3_positions_are_divided_as_transformers_divides_them(where: str, tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    said = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    model = model_of("llama", head_dim=64, rope_parameters={**said, "rope_theta": 10000.0})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    config = {key: value for key, value in config_of(model).items() if key != "rope_parameters"}
    config |= {where: said, "rope_theta": 10000.0}
    out, tensors, _ = written(tmp_path, model, config=config)
    found = next(tensor for tensor in gguf.GGUFReader(out).tensors if tensor.name == "rope_freqs.weight")
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(torch.from_numpy(np.array(found.data)), plain / scaled)
    assert check_gguf(out, tensors, config=config, kind="f16") < ERRORS["f16"]


def test_positions_that_are_not_scaled_need_no_table() -> None:
    assert rope_factors(Rope(1e4), 64) is None
    assert rope_factors(Rope(1e4, "linear", 2.0), 64) is None


@pytest.mark.parametrize(("kind", "more"), [("linear", {}), ("yarn", {"original_max_position_embeddings": 32})])
def test_linear_and_yarn_are_keys(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = model_of("qwen2")
    config = {**config_of(model), "rope_parameters": {"rope_type": kind, "factor": 4.0, "rope_theta": 1e6, **more}}
    out, _, _ = written(tmp_path, model, config=config)
    found = fields(out)
    assert found["qwen2.rope.scaling.type"] == kind
    assert found["qwen2.rope.scaling.factor"] == 4.0
    assert found.get("qwen2.rope.scaling.original_context_length") == more.get("original_max_position_embeddings")


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "scales its positions by 'dynamic'"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}, "yarn with beta_fast = 16"),
        ({"rope_type": "llama3", "factor": 2.0}, "does not say original_max_position_embeddings"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rotates 0.5 of each head"),
    ],
)
def test_positions_that_readers_would_rotate_otherwise_are_refused(
    rope: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = model_of("llama")
    with pytest.raises(ModelError, match=said):
        written(tmp_path, model, config={**config_of(model), "rope_parameters": rope})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_an_olmo2_is_written_under_the_names_that_llama_cpp_reads(kind: Kind, tmp_path: Path) -> None:
    """transformers reads no such file: its tensors are given back to transformers' class by hand."""
    model = model_of("olmo2")
    out, tensors, _ = written(tmp_path, model, kind)
    assert check_gguf(out, tensors, config=config_of(model), kind=kind) < ERRORS[kind]
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
        **{f"blk.{layer}.{theirs}": f"model.layers.{layer}.{ours}" for layer in (0, 1) for theirs, ours in OLMO2},
    }  # fmt: skip
    found = {tensor.name.removesuffix(".weight"): tensor for tensor in gguf.GGUFReader(out).tensors}
    assert found.keys() == names.keys()
    twin = model_of("olmo2")
    values = {
        f"{names[name]}.weight": torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for name, tensor in found.items()
    }
    twin.load_state_dict(values)
    assert difference(rounded(model, kind), twin) < EXACT
    assert fields(out)["general.architecture"] == "olmo2"
    assert fields(out)["olmo2.attention.head_count_kv"] == 2


OLMO2 = (
    ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"), ("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm"),
    ("post_attention_norm", "post_attention_layernorm"), ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"), ("post_ffw_norm", "post_feedforward_layernorm"),
)  # fmt: skip
