import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from qdist.core.errors import ModelError
from qdist.core.model.families import from_config
from qdist.host.sources.models import find_shape
from qdist.runtime.exports.gguf.export import check_gguf
from qdist.runtime.exports.gguf.file import Affine, Kind
from tests.runtime.gguf_models import (
    ERRORS,
    FAMILIES,
    KINDS,
    config_of,
    fields,
    model_of,
    random_affine,
    tensors_of,
    written,
)

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
    [
        ("qwen3", {"attention_bias": True}, "has attention_bias"),
        ("qwen2", {"head_dim": 32}, "heads of 128 in all"),
        ("olmo2", {"attention_bias": True}, "has attention_bias"),
        ("olmo2", {"head_dim": 32}, "heads of 128 in all"),
        ("olmo2", {"tie_word_embeddings": True}, "has tied embeddings"),
    ],
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


# A model of any size, and nothing that takes long to import.
LARGE = """
import os, signal, sys
from pathlib import Path
import torch
from qdist.runtime.exports.gguf import blocks
from qdist.runtime.exports.gguf.file import Affine, write_gguf
from qdist.runtime.exports.gguf.export import check_gguf

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

blocks._CHUNK = 1 << 18
out = Path(sys.argv[1])
# What is imported and set up once is not of a tensor: a small model goes first.
sizes, large = {WIDE: 64, INNER: 128}, (shapes, config)
shapes = {name: tuple(sizes[size] for size in shape) for name, shape in shapes.items()}
config = config | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
write_gguf(out, tensors("f16"), config=config, tokenizer=None, name="small", kind="f16")
check_gguf(out, tensors("f16"), config=config, kind="f16")
shapes, config = large
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
        patch.setattr("qdist.runtime.exports.gguf.blocks.row_order", lambda count, heads: torch.arange(count))
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
    with pytest.raises(ModelError, match="not a whole GGUF file"):
        check_gguf(out, tensors, config=config_of(model), kind="f16")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["model.gguf", "MODEL.GGUF"])
def test_a_file_is_planned_for_as_what_it_becomes_when_it_is_converted(family: str, name: str, tmp_path: Path) -> None:
    """By its header alone, whatever letters its name ends in."""
    from transformers import AutoConfig

    out, _, _ = written(tmp_path, model_of(family, tie_word_embeddings=family == "qwen2"))
    file = out.rename(tmp_path / name)
    found = find_shape(str(file))
    converted = AutoConfig.from_pretrained(str(tmp_path), gguf_file=name).to_dict()
    assert found is not None
    assert found.facts == from_config(converted, name=str(file))
