"""Tiny checkpoints as Sparsebit packs them, in every packing and naming, and readers of the folders made of them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from safetensors.torch import load_file

from qdist.core.model.gptq import from_config
from qdist.runtime.kernels.gptq_bits import dequantize
from qdist.runtime.quantize.blueprint import Blueprint, blueprint
from qdist.runtime.quantize.sparsebit import convert as conversion

HIDDEN, INNER, VOCAB, LAYERS, HEADS, KV_HEADS = 64, 96, 48, 2, 4, 2
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "architectures": ["LLaMAForCausalLM"],
}  # fmt: skip
KEY_ROWS = HIDDEN // HEADS * KV_HEADS
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEY_ROWS, HIDDEN),
    "self_attn.v_proj": (KEY_ROWS, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
PRE_RELEASE = {
    "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "mlp": "feed_forward",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "model.": "model.decoder.",
}  # fmt: skip
META = PRE_RELEASE | {
    "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "self_attn": "attention", "model.": "",
    "embed_tokens": "tok_embeddings", "lm_head": "output",
}  # fmt: skip
NAMINGS: dict[str, dict[str, str]] = {"transformers": {}, "pre-release": PRE_RELEASE, "meta": META}
MIXED = {"self_attn.v_proj": 2, "mlp.down_proj": 3}


class Made(NamedTuple):
    """A checkpoint's content, and q x scale - zeros of each linear, [out, in], in transformers' order of rows."""

    content: dict[str, Any]
    truth: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]


def make(**given: Any) -> Made:
    """What `made` made, in dicts of its own; tensors are shared and must be replaced, not changed."""
    content, truth, biases = made(**given)
    return Made({key: dict(value) for key, value in content.items()}, dict(truth), biases)


@cache
def made(
    *,
    naming: str = "transformers",
    packing: str = "int32",
    mixed: bool = False,
    bits: int = 4,
    group_size: int = -1,
    lowest: int = 1,
    dtype: torch.dtype = torch.float32,
    biased: tuple[str, ...] = (),
) -> Made:
    """lowest: of the zeros. biased: parts of the paths of linears whose bias is not zero."""
    dice = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    bits_of, truth, biases = {}, {}, {}
    old = lambda name: rename(name, NAMINGS[naming])  # noqa: E731
    for layer in range(LAYERS):
        for part, (outputs, inputs) in SHAPES.items():
            path = f"model.layers.{layer}.{part}"
            width = MIXED.get(part, bits) if mixed else bits
            groups = 1 if group_size == -1 else inputs // group_size
            q = torch.randint(0, 1 << width, (outputs, inputs), generator=dice)
            scales = ((torch.rand(outputs, groups, 1, generator=dice) + 0.5) / 100).to(dtype)
            integers = torch.randint(lowest, 1 << width, (outputs, groups, 1), generator=dice)
            zeros = (integers * scales.float()).to(dtype)
            wide = q.reshape(outputs, groups, -1) * scales.double() - zeros.double()
            truth[path] = wide.reshape(outputs, inputs)
            bias = torch.randn(outputs, generator=dice) * any(part in path for part in biased)
            biases[path] = bias
            if naming == "meta" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                rows = rows_of_meta(outputs)
                q, scales, zeros, bias = q[rows], scales[rows], zeros[rows], bias[rows]
            leaves = {"qweight": packed(q, width, packing), "scales": scales, "zeros": zeros, "bias": bias}
            for leaf in ("scales", "zeros"):
                leaves[leaf] = leaves[leaf] if groups > 1 else leaves[leaf].reshape(outputs, 1)
            state |= {f"{old(path)}.{leaf}": value for leaf, value in leaves.items()}
            bits_of[old(path)] = width
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[old(f"model.layers.{layer}.{norm}.weight")] = torch.rand(HIDDEN, generator=dice).half()
        state[old(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq")] = torch.rand(8, generator=dice)
    state[old("model.embed_tokens.weight")] = torch.randn(VOCAB, HIDDEN, generator=dice).half()
    state[old("model.norm.weight")] = torch.rand(HIDDEN, generator=dice).half()
    state[old("lm_head.weight")] = torch.randn(VOCAB, HIDDEN, generator=dice).half()
    content = {"model": state, "hyper_parameters": {"groupsize": group_size}, "layers_bit": bits_of}
    return Made(content, truth, biases)


def rename(name: str, table: dict[str, str]) -> str:
    for new, old in table.items():
        name = name.replace(new, old)
    return name


def rows_of_meta(rows: int) -> list[int]:
    """Which of transformers' rows each of Meta's is: pairs beside each other instead of half a head apart."""
    size = HIDDEN // HEADS
    return [head * size + i + half for head in range(rows // size) for i in range(size // 2) for half in (0, size // 2)]


def packed(q: torch.Tensor, bits: int, packing: str) -> torch.Tensor:
    """[out, in] as one long number a column, the first input lowest, cut into words or bytes."""
    columns = []
    for row in q.tolist():
        number = sum(value << (bits * place) for place, value in enumerate(row))
        data = number.to_bytes(bits * len(row) // 8, "little")
        columns.append(torch.frombuffer(bytearray(data), dtype=torch.int32 if packing == "int32" else torch.int8))
    words = torch.stack(columns, dim=1)
    if packing == "uint8":
        words = words.view(torch.uint8)
    return words.t().contiguous() if packing == "transposed" else words


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    read = {name: value for file in sorted(set(index.values())) for name, value in load_file(folder / file).items()}
    assert set(read) == set(index)
    return read


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """[out, in] of each linear, float32, by what the folder says of itself."""
    gptq = from_config(json.loads((folder / "quantize_config.json").read_text()), name=str(folder))
    stored, weights = tensors(folder), {}
    for name in stored:
        path, _, leaf = name.rpartition(".")
        shape = gptq.of(path)
        if leaf == "qweight":
            assert shape is not None
            parts = [stored[f"{path}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")]
            offset = gptq.zero_offset
            weights[path] = dequantize(*parts, bits=shape.bits, offset=offset, dtype=torch.float32).t()
        elif leaf == "weight" and "_proj" in path:
            assert shape is None
    return weights


def assert_same_weights(folder: Path, made: Made) -> None:
    """A float16 scale is at most 2^-11 off; that times the most that a weight can be is what differs."""
    found = dequantized(folder)
    assert found.keys() == made.truth.keys()
    for path, weight in made.truth.items():
        torch.testing.assert_close(found[path].double(), weight, rtol=2**-11 * 1.01, atol=1e-6)


SHAPES_OF: dict[str, Blueprint] = {}


def shape_of(settings: str, folder: Path) -> Blueprint:
    if settings not in SHAPES_OF:
        SHAPES_OF[settings] = blueprint(folder)
    return SHAPES_OF[settings]


@contextmanager
def quick() -> Iterator[None]:
    """Without what takes most of the time: flushing to a disk, threads, building the same model again and again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        mock.patch("os.fsync"),
        mock.patch.object(
            conversion, "blueprint", lambda folder: shape_of((folder / "config.json").read_text(), folder)
        ),
    ):
        yield
    torch.set_num_threads(threads)


def write_config(folder: Path) -> Path:
    """A model folder without weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return folder
