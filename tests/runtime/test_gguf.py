import copy
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from qdist.core.errors import ModelError
from qdist.runtime.exports.gguf import Affine, Kind, Report, write_gguf
from qdist.runtime.exports.gguf_blocks import dense, row_order
from qdist.runtime.exports.gguf_check import check_gguf
from qdist.runtime.exports.gguf_rope import Rope, rope_factors
from tests.runtime.tiny import logits_of, tiny_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
KINDS: tuple[Kind, ...] = ("f16", "q8_0", "q4_1")
EXACT = 1e-5
"""What float32 adds to logits, relative to the largest: the file's norms have an epsilon of float32, for one."""
ERRORS = {"f16": 2.0**-11 + 1e-5, "q8_0": 1 / 254 + 2.0**-11 + 1e-3, "q4_1": 1e-3}
"""Of a weight, relative to the largest of its tensor."""
QWEN3: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
"""transformers' GGUF reader gives every Qwen3 heads of 128, whatever the file says."""


def model_of(family: str, **changes: Any) -> Any:
    """A tiny model whose biases and norms are not what they are initialized to."""
    model = tiny_model(family, **{**(QWEN3 if family == "qwen3" else {}), **changes})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def tensors_of(model: Any, kind: Kind = "f16", *, group_size: int = 32) -> dict[str, Any]:
    """A model's tensors; for q4_1 its linears become random affine ones, which the model takes over."""
    state = {name: value for name, value in model.state_dict().items() if name in dict(model.named_parameters())}
    tensors: dict[str, Any] = {name: (tuple(value.shape), value.clone) for name, value in state.items()}
    if kind == "q4_1":
        for seed, name in enumerate(name for name in state if name.endswith("_proj.weight")):
            affine = random_affine(tuple(state[name].shape), group_size=group_size, seed=seed)
            tensors[name] = tuple(state[name].shape), partial(affine._replace)
            state[name].copy_(weights_of(affine))
    return tensors


def random_affine(shape: tuple[int, ...], *, group_size: int = 32, seed: int = 0) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-shape[1] // group_size)
    values = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, shape[0], generator=generator) * 0.05 + 0.005).half()
    zeros = torch.rand(groups, shape[0], generator=generator) * 15
    return Affine(values, scales, -scales.float() * zeros, group_size)


def weights_of(affine: Affine) -> torch.Tensor:
    """What Q4_1 stands for, weight by weight: minimums in fp16."""
    group = torch.arange(affine.values.shape[1]) // affine.group_size
    minimums = affine.minimums.half().float().t()[:, group]
    return affine.values.float() * affine.scales.half().float().t()[:, group] + minimums


def rounded(model: Any, kind: Kind) -> Any:
    """The model with its matrices rounded as the kind rounds them, written down anew. Affine linears are exact."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if weight.dim() == 2 and kind == "q8_0" and weight.shape[1] % 32 == 0:
                blocks = weight.reshape(-1, 32)
                steps = blocks.abs().amax(1, keepdim=True) / 127
                levels = (blocks * (1 / steps)).abs().add(0.5).floor() * blocks.sign()
                weight.copy_((levels * steps.half().float()).reshape(weight.shape))
            elif weight.dim() == 2 and not (kind == "q4_1" and name.endswith("_proj.weight")):
                weight.copy_(weight.half())
    return twin


def config_of(model: Any) -> dict[str, Any]:
    settings: dict[str, Any] = model.config.to_dict()
    return settings


def written(folder: Path, model: Any, kind: Kind = "f16", **more: Any) -> tuple[Path, dict[str, Any], Report]:
    tensors = more.pop("tensors", None) or tensors_of(model, kind)
    config = more.pop("config", None) or config_of(model)
    out = folder / "model.gguf"
    report = write_gguf(out, tensors, config=config, tokenizer=None, name="tiny", kind=kind, **more)
    return out, tensors, report


def read_back(out: Path, config: Any = None) -> Any:
    from transformers import AutoModelForCausalLM

    more = {"config": config} if config is not None else {}
    return AutoModelForCausalLM.from_pretrained(str(out.parent), gguf_file=out.name, dtype=torch.float32, **more).eval()


def difference(model: Any, other: Any) -> float:
    """The largest difference of logits, relative to the largest logit."""
    expected, found = logits_of(model), logits_of(other)
    return float((found - expected).abs().max() / expected.abs().max())


def fields(out: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(out).fields.items()}


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


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt_neox"}, "llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.self_attn.q_proj.weight and 8 more"),
        ({"num_hidden_layers": 1}, "has model.layers.1.self_attn.q_proj.weight and 8 more"),
        ({"vocab_size": 321}, r"embed_tokens.weight has shape \[320, 64\]"),
    ],
)
def test_another_model_is_refused_before_anything_is_written(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = model_of("llama")
    with pytest.raises(ModelError, match=said):
        written(tmp_path, model, config={**config_of(model), **changes})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [("qwen3", {"attention_bias": True}, "has attention_bias"), ("qwen2", {"head_dim": 32}, "heads of 128 in all")],
)
def test_what_llama_cpp_does_not_load_is_refused(
    family: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=said):
        written(tmp_path, model_of(family, **changes))


def test_linears_that_blocks_do_not_fill_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = model_of("qwen2", hidden_size=48)
    with pytest.raises(ModelError, match=r"q_proj\.weight has 48 inputs, and Q4_1 takes them 32 at a time"):
        written(tmp_path, model, "q4_1", tensors=tensors_of(model))
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_vocabulary_says_so(tmp_path: Path) -> None:
    out, _, report = written(tmp_path, model_of("llama"))
    assert fields(out)["tokenizer.ggml.model"] == "none"
    assert report.pre is None
    assert report.notes == ("the file has no vocabulary: llama.cpp computes with token ids alone",)


def affine_with(**changes: Any) -> Affine:
    return random_affine((128, 64))._replace(**changes)


@pytest.mark.parametrize(
    ("kind", "made", "said"),
    [
        ("f16", torch.full((128, 64), 7e4), "up_proj.weight reaches 70000, and fp16 ends at 65504"),
        ("q8_0", torch.full((128, 64), 1e7), r"up_proj.weight reaches 1e\+07"),
        ("q8_0", torch.full((128, 64), torch.nan), "up_proj.weight has numbers that are not finite"),
        ("f16", torch.zeros(64, 128), r"up_proj.weight has shape \[64, 128\], not \[128, 64\]"),
        ("q4_1", torch.zeros(128, 64), "up_proj.weight is torch.float32, and Q4_1 takes"),
        ("q4_1", affine_with(scales=torch.full((2, 128), 7e4)), "up_proj.weight reaches 70000"),
        ("q4_1", affine_with(minimums=torch.full((2, 128), -7e4)), "up_proj.weight reaches 70000"),
        ("q4_1", affine_with(values=torch.full((128, 64), 16, dtype=torch.uint8)), "has a value of 16"),
        ("q4_1", affine_with(group_size=16), "has groups of 16 of 64 inputs"),
        ("q4_1", affine_with(scales=torch.ones(128, 2)), r"has scales \[128, 2\], not \[2, 128\]"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_nothing_is_left(
    kind: Kind, made: Any, said: str, tmp_path: Path
) -> None:
    model = model_of("llama")
    tensors = tensors_of(model, kind)
    tensors["model.layers.1.mlp.up_proj.weight"] = (128, 64), lambda: made
    with pytest.raises(ModelError, match=said):
        written(tmp_path, model, kind, tensors=tensors)
    assert not list(tmp_path.iterdir())


def test_blocks_too_small_for_fp16_become_zeros(tmp_path: Path) -> None:
    model = model_of("llama")
    model.model.layers[0].mlp.up_proj.weight.data[3] = 1e-40
    out, tensors, _ = written(tmp_path, model, "q8_0")
    assert check_gguf(out, tensors, config=config_of(model), kind="q8_0") < ERRORS["q8_0"]


# The file is whole or absent


def test_an_earlier_file_stays_where_a_new_one_fails(tmp_path: Path) -> None:
    model = model_of("llama")
    out, tensors, _ = written(tmp_path, model)
    before = out.read_bytes()
    tensors["model.norm.weight"] = (64,), lambda: torch.full((64,), torch.inf)
    with pytest.raises(ModelError, match="not finite"):
        written(tmp_path, model, tensors=tensors)
    assert out.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


# One decoder layer and nothing that takes long to import.
LARGE = """
import os, signal, sys
from pathlib import Path
import torch
from qdist.runtime.exports import gguf_blocks
from qdist.runtime.exports.gguf import Affine, write_gguf
from qdist.runtime.exports.gguf_check import check_gguf

torch.set_num_threads(1)  # more would wait for each other on a busy machine
LAYERS, WIDE, INNER = (int(number) for number in sys.argv[2:5])
config = {"model_type": "llama", "hidden_size": WIDE, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
          "num_attention_heads": 16, "vocab_size": 4096, "max_position_embeddings": 64, "tie_word_embeddings": True}
shapes = {"model.embed_tokens.weight": (4096, WIDE), "model.norm.weight": (WIDE,)}
for layer in range(LAYERS):
    before = f"model.layers.{layer}"
    shapes |= {f"{before}.self_attn.{name}_proj.weight": (WIDE, WIDE) for name in "qkvo"}
    shapes |= {f"{before}.mlp.{name}_proj.weight": (INNER, WIDE) for name in ("gate", "up")}
    shapes |= {f"{before}.mlp.down_proj.weight": (WIDE, INNER)}
    shapes |= {f"{before}.{name}_layernorm.weight": (WIDE,) for name in ("input", "post_attention")}

def make(shape, affine):
    if not affine:
        return torch.full(shape, 0.5, dtype=torch.bfloat16)
    numbers = torch.ones(shape[1] // 128, shape[0])
    return Affine(torch.full(shape, 7, dtype=torch.uint8), numbers.half(), numbers, 128)

def tensors(kind):
    return {name: (shape, lambda shape=shape, affine=kind == "q4_1" and name.endswith("_proj.weight"):
                   make(shape, affine)) for name, shape in shapes.items()}
"""
KILLED = """
known = tensors("f16") | {"model.layers.0.mlp.down_proj.weight": (
    (WIDE, INNER), lambda: os.kill(os.getpid(), signal.SIGKILL))}
write_gguf(Path(sys.argv[1]), known, config=config, tokenizer=None, name="large", kind="f16")
"""
MEMORY = """
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10

def watched(act):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = peak()
    act()
    return (peak() - before) >> 20

gguf_blocks._CHUNK = 1 << 18
out = Path(sys.argv[1])
make((1024, 1024), False)
for kind in ("f16", "q8_0", "q4_1"):
    grown = watched(lambda: write_gguf(out, tensors(kind), config=config, tokenizer=None, name="large", kind=kind))
    checked = watched(lambda: check_gguf(out, tensors(kind), config=config, kind=kind))
    print(kind, grown, checked, out.stat().st_size >> 20)
"""


def alone(script: str, out: Path, *, layers: int, wide: int, inner: int) -> "subprocess.CompletedProcess[str]":
    """What a process does with a model of its own."""
    arguments = [sys.executable, "-c", LARGE + script, str(out), str(layers), str(wide), str(inner)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    killed = alone(KILLED, tmp_path / "model.gguf", layers=1, wide=64, inner=128)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [file.name for file in tmp_path.iterdir()] == [".model.gguf.unfinished"]
    model = model_of("llama")
    out, tensors, _ = written(tmp_path, model)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    assert check_gguf(out, tensors, config=config_of(model), kind="f16") < ERRORS["f16"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's to tell")
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """The largest of 29 matrices has 8 MiB in bfloat16, 4 MiB as values of 4 bits, a chunk of it 1 MiB in float32.

    Pages of the file that is read back are counted too, until Linux needs them for something else.
    """
    shown = alone(MEMORY, tmp_path / "large.gguf", layers=4, wide=1024, inner=4096)
    assert shown.returncode == 0, shown.stderr
    for line in shown.stdout.splitlines():
        _, grown, checked, size = line.split()
        assert int(size) > 40, line
        assert int(grown) < 24, line
        assert int(checked) < int(size) + 24, line


# Reading back


def test_a_weight_that_is_off_is_found(tmp_path: Path) -> None:
    model = model_of("llama")
    for kind in KINDS:
        out, tensors, _ = written(tmp_path, model, kind)
        raw = bytearray(out.read_bytes())
        where = next(tensor for tensor in gguf.GGUFReader(out).tensors if tensor.name == "blk.1.attn_q.weight")
        raw[int(where.data_offset) + 1] ^= 4  # the exponent of the first number, which for blocks is the scale
        out.write_bytes(raw)
        with pytest.raises(ModelError, match=r"q_proj\.weight off by"):
            check_gguf(out, tensors, config=config_of(model), kind=kind)


def test_another_value_of_four_bits_is_found(tmp_path: Path) -> None:
    model = model_of("llama")
    out, tensors, _ = written(tmp_path, model, "q4_1")
    affine: Affine = tensors["model.layers.0.mlp.up_proj.weight"][1]()
    affine.values[5, 7] ^= 1
    with pytest.raises(ModelError, match=r"up_proj\.weight off by"):
        check_gguf(out, tensors, config=config_of(model), kind="q4_1")


def test_rows_in_another_order_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    with monkeypatch.context() as patch:
        patch.setattr("qdist.runtime.exports.gguf_blocks.row_order", lambda count, heads: torch.arange(count))
        out, tensors, _ = written(tmp_path, model)
    with pytest.raises(ModelError, match=r"q_proj\.weight off by"):
        check_gguf(out, tensors, config=config_of(model), kind="f16")


def test_another_file_is_told_apart(tmp_path: Path) -> None:
    model = model_of("llama")
    out, tensors, _ = written(tmp_path, model)
    with pytest.raises(ModelError, match="not Q8_0"):
        check_gguf(out, tensors, config=config_of(model), kind="q8_0")
    tied = {**config_of(model), "tie_word_embeddings": True}
    with pytest.raises(ModelError, match=r"differ in output\.weight"):
        check_gguf(out, tensors, config=tied, kind="f16")
    out.write_bytes(out.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="no whole GGUF file"):
        check_gguf(out, tensors, config=config_of(model), kind="f16")
