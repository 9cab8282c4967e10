import argparse
import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from qdist.core.errors import ModelError, RunError
from qdist.core.gptq import from_config
from qdist.core.models import config_of
from qdist.runtime.gptq import convert as conversion
from qdist.runtime.gptq.bits import dequantize, unpack_zeros
from qdist.runtime.gptq.convert import Converted, convert
from qdist.runtime.gptq.convert_model import model_config
from qdist.runtime.gptq.sparsebit import Checkpoint, halves
from qdist.runtime.quantize_source import Blueprint, blueprint

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
    """A copy of what `made` made, to be changed."""
    return copy.deepcopy(made(**given))


@cache
def made(
    *,
    naming: str = "transformers",
    packing: str = "int32",
    mixed: bool = False,
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
            bits = MIXED.get(part, 4) if mixed else 4
            groups = 1 if group_size == -1 else inputs // group_size
            q = torch.randint(0, 1 << bits, (outputs, inputs), generator=dice)
            scales = ((torch.rand(outputs, groups, 1, generator=dice) + 0.5) / 100).to(dtype)
            integers = torch.randint(lowest, 1 << bits, (outputs, groups, 1), generator=dice)
            zeros = (integers * scales.float()).to(dtype)
            wide = q.reshape(outputs, groups, -1) * scales.double() - zeros.double()
            truth[path] = wide.reshape(outputs, inputs)
            bias = torch.randn(outputs, generator=dice) * any(part in path for part in biased)
            biases[path] = bias
            if naming == "meta" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                rows = rows_of_meta(outputs)
                q, scales, zeros, bias = q[rows], scales[rows], zeros[rows], bias[rows]
            leaves = {"qweight": packed(q, bits, packing), "scales": scales, "zeros": zeros, "bias": bias}
            for leaf in ("scales", "zeros"):
                leaves[leaf] = leaves[leaf] if groups > 1 else leaves[leaf].reshape(outputs, 1)
            state |= {f"{old(path)}.{leaf}": value for leaf, value in leaves.items()}
            bits_of[old(path)] = bits
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


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes most of the time: flushing to a disk, building the same model class again and again."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(conversion, "blueprint", lambda folder: shape_of((folder / "config.json").read_text(), folder))


SHAPES_OF: dict[str, Blueprint] = {}


def shape_of(settings: str, folder: Path) -> Blueprint:
    if settings not in SHAPES_OF:
        SHAPES_OF[settings] = blueprint(folder)
    return SHAPES_OF[settings]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], Path]:
    def saved(content: object) -> Path:
        torch.save(content, tmp_path / "llama_4w.pth.tar")
        return tmp_path / "llama_4w.pth.tar"

    return saved


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return folder


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


@pytest.mark.parametrize(
    ("naming", "packing", "group_size"),
    [
        ("transformers", "int32", 32),
        ("pre-release", "int32", -1),
        ("pre-release", "int8", 32),
        ("meta", "uint8", -1),
        ("meta", "int32", 32),
        ("transformers", "transposed", -1),
    ],
)
def test_a_folder_holds_the_weights_of_the_checkpoint_at_2_3_and_4_bits(
    naming: str, packing: str, group_size: int, write: Callable[[object], Path], config: Path, tmp_path: Path
) -> None:
    made = make(naming=naming, packing=packing, group_size=group_size, mixed=True)
    done = convert(write(made.content), tmp_path / "out", config=config)
    assert_same_weights(tmp_path / "out", made)
    assert (done.gptq.shape.bits, done.gptq.shape.group_size, done.gptq.format) == (4, group_size, "gptq")
    assert {done.gptq.of(path).bits for path in made.truth if path.endswith("v_proj")} == {2}  # type: ignore[union-attr]
    old = {value.flatten()[0].item() for name, value in made.content["model"].items() if "norm" in name}
    stored = tensors(tmp_path / "out")
    assert old == {value[0].item() for name, value in stored.items() if "norm" in name}
    assert stored["lm_head.weight"].dtype == torch.float16
    assert not [name for name in stored if name.endswith(("inv_freq", "bias"))]
    assert [note for note in done.notes if "query and key" in note] == [
        "rows of 4 query and key weights reordered from Meta's order to transformers'"
    ] * (naming == "meta")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_words_are_the_very_words_of_the_checkpoint(
    write: Callable[[object], Path], config: Path, tmp_path: Path
) -> None:
    made = make(mixed=True)
    bytewise = make(mixed=True, packing="int8")
    convert(write(made.content), tmp_path / "out", config=config)
    convert(write(bytewise.content), tmp_path / "out8", config=config)
    stored, stored8 = tensors(tmp_path / "out"), tensors(tmp_path / "out8")
    words = {name: value for name, value in made.content["model"].items() if name.endswith("qweight")}
    assert all(torch.equal(stored[name], value) and torch.equal(stored8[name], value) for name, value in words.items())


def test_the_folder_has_its_tokenizer_and_both_configurations(
    write: Callable[[object], Path], config: Path, tmp_path: Path
) -> None:
    (config / "tokenizer").mkdir()
    (config / "tokenizer" / "tokenizer.model").write_text("pieces")
    (config / "model.safetensors.index.json").write_text("{}")
    convert(write(make().content), tmp_path / "out", config=config)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", *(f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)),
        "model.safetensors.index.json", "quantize_config.json", "tokenizer.json", "tokenizer.model",
    ]  # fmt: skip
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["quantization_config"] == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert settings["torch_dtype"] == "float16"
    assert os.stat(tmp_path / "out").st_mode & 0o777 == 0o755


def test_a_zero_of_0_needs_the_second_format(write: Callable[[object], Path], config: Path, tmp_path: Path) -> None:
    made = make(lowest=0, mixed=True)
    assert convert(write(made.content), tmp_path / "out", config=config).gptq.format == "gptq_v2"
    assert_same_weights(tmp_path / "out", made)


def test_only_zeros_that_all_are_half_of_the_range_are_symmetric(
    write: Callable[[object], Path], config: Path, tmp_path: Path
) -> None:
    made = make(mixed=True)
    state = made.content["model"]
    for name in [name for name in state if name.endswith("zeros")]:
        half = 1 << (made.content["layers_bit"][name.removesuffix(".zeros")] - 1)
        state[name] = state[name.removesuffix("zeros") + "scales"] * half
    assert convert(write(made.content), tmp_path / "out", config=config).gptq.sym
    assert not convert(write(make().content), tmp_path / "other", config=config).gptq.sym


def test_linears_left_in_16_bits_are_left_alone(write: Callable[[object], Path], config: Path, tmp_path: Path) -> None:
    made = make(naming="meta")
    state, plain = made.content["model"], torch.randn(HIDDEN, HIDDEN).half()
    for leaf in ("qweight", "scales", "zeros", "bias"):
        del state[f"layers.1.attention.wq.{leaf}"]
    del made.content["layers_bit"]["layers.1.attention.wq"], made.truth["model.layers.1.self_attn.q_proj"]
    state["layers.1.attention.wq.weight"] = plain[rows_of_meta(HIDDEN)]
    done = convert(write(made.content), tmp_path / "out", config=config)
    assert_same_weights(tmp_path / "out", made)
    assert torch.equal(tensors(tmp_path / "out")["model.layers.1.self_attn.q_proj.weight"], plain)
    assert done.gptq.of("model.layers.1.self_attn.q_proj") is None
    assert done.gptq.of("model.layers.1.self_attn.k_proj") is not None


@pytest.mark.parametrize(
    ("biased", "drop", "kept", "note"),
    [
        ((), False, 0, "biases: all 14 are zero and left out"),
        (("q_proj",), False, 8, "biases: 8 kept, 2 of them not zero; config.json asks for them"),
        (("q_proj", "mlp"), False, 14, "biases: 14 kept, 8 of them not zero; config.json asks for them"),
        (("mlp",), True, 0, "biases: 14 left out as asked, 6 of them not zero"),
    ],
)
def test_biases_are_kept_where_there_are_any_and_the_model_asks_for_them(
    biased: tuple[str, ...], drop: bool, kept: int, note: str,
    write: Callable[[object], Path], config: Path, tmp_path: Path,
) -> None:  # fmt: skip
    made = make(naming="meta", biased=biased)
    done = convert(write(made.content), tmp_path / "out", config=config, drop_bias=drop)
    stored = tensors(tmp_path / "out")
    assert len([name for name in stored if name.endswith(".bias")]) == kept
    for name in stored:
        if name.endswith(".bias"):
            assert torch.equal(stored[name], made.biases[name.removesuffix(".bias")])
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings.get("attention_bias", False) == (kept > 0)
    assert settings.get("mlp_bias", False) == (kept == 14)
    assert note in done.notes


def test_transformers_computes_the_same_with_the_folder_as_with_the_checkpoint(
    write: Callable[[object], Path], config: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    made = make(naming="meta", mixed=True, group_size=32, biased=("self_attn",))
    convert(write(made.content), tmp_path / "out", config=config)
    settings = AutoConfig.from_pretrained(tmp_path / "out")
    del settings.quantization_config
    stored = tensors(tmp_path / "out")
    plain = {name: value.float() for name, value in stored.items() if name.endswith((".weight", ".bias"))}
    by_hand = {f"{path}.weight": value.float() for path, value in made.truth.items()}
    logits = []
    for weights in ({f"{path}.weight": value for path, value in dequantized(tmp_path / "out").items()}, by_hand):
        model = LlamaForCausalLM(settings).eval()
        model.load_state_dict(plain | weights)
        with torch.no_grad():
            logits.append(model(torch.arange(20)[None]).logits)
    assert logits[0].std() > 1
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0.01 * float(logits[1].std()))


def test_reordered_rows_turn_with_positions_as_metas_do() -> None:
    """The score of a query and a key at two positions: Meta turns complex pairs, transformers halves."""
    size, heads = 16, 2
    query, key = torch.randn(2, heads * size).double().unbind()
    angle = 10_000.0 ** (-torch.arange(0, size, 2).double() / size)

    def meta(rows: torch.Tensor, position: int) -> torch.Tensor:
        pairs = torch.view_as_complex(rows.reshape(heads, -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), position * angle)).reshape(heads, -1)

    def transformers(rows: torch.Tensor, position: int) -> torch.Tensor:
        first, second = rows.reshape(heads, 2, -1).unbind(1)
        cos, sin = torch.cos(position * angle), torch.sin(position * angle)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)

    order = halves(heads * size, heads)
    torch.testing.assert_close(
        (transformers(query[order], 7) * transformers(key[order], 3)).sum(1), (meta(query, 7) * meta(key, 3)).sum(1)
    )


def test_an_older_file_keeps_its_command_line_in_a_namespace(
    write: Callable[[object], Path], config: Path, tmp_path: Path
) -> None:
    made = make()
    given = argparse.Namespace(groupsize=-1, candidate_bits=[2, 3, 4], save="x.pth.tar", model="llama-7b")
    source = write({**made.content, "hyper_parameters": given})
    convert(source, tmp_path / "out", config=config)
    assert_same_weights(tmp_path / "out", made)


def test_a_file_of_torchs_older_format_is_read(config: Path, tmp_path: Path) -> None:
    made = make()
    torch.save(made.content, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old.bin", tmp_path / "out", config=config)
    assert_same_weights(tmp_path / "out", made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_numbers_still_give_integer_zeros(
    dtype: torch.dtype, write: Callable[[object], Path], config: Path, tmp_path: Path
) -> None:
    made = make(dtype=dtype, lowest=0)
    done = convert(write(made.content), tmp_path / "out", config=config)
    stored = tensors(tmp_path / "out")
    for path in made.truth:
        given = {leaf: made.content["model"][f"{path}.{leaf}"].double() for leaf in ("scales", "zeros")}
        zeros = unpack_zeros(stored[f"{path}.qzeros"], 4, done.gptq.zero_offset)
        assert torch.equal(zeros.double(), (given["zeros"] / given["scales"]).round().t())
        assert torch.equal(stored[f"{path}.scales"].double(), given["scales"].t())
    assert f"scales: {str(dtype).removeprefix('torch.')} to float16, which stay the same" in done.notes


def test_what_float16_takes_from_scales_is_said(write: Callable[[object], Path], config: Path, tmp_path: Path) -> None:
    made = make()
    state = made.content["model"]
    state["model.layers.0.mlp.up_proj.scales"][5] = 1.0 + 2**-11
    state["model.layers.0.mlp.up_proj.zeros"][5] = 8 * (1.0 + 2**-11)
    done = convert(write(made.content), tmp_path / "out", config=config)
    assert "scales: float32 to float16, which change by at most 0.049 %" in done.notes


def spoil(made: Made, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    made.content["model"][name] = change(made.content["model"][name])


def add(at: int, factor: float, made: Made, path: str) -> None:
    """Move one zero by a part of its scale."""
    state = made.content["model"]
    state[f"{path}.zeros"].view(-1)[at] += factor * state[f"{path}.scales"].view(-1)[at]


GATE = "model.layers.0.mlp.gate_proj"
BOTH = ("scales", "zeros")
SPOILED: dict[str, tuple[Callable[[Made], object], str]] = {
    "zeros between integers": (
        lambda made: (add(3, 0.05, made, GATE), add(1, 0.3, made, "model.layers.1.mlp.up_proj")),
        r"model.layers.1.mlp.up_proj.zeros over its scales is 0.300 away from integers, and so are 1 more",
    ),
    "a zero beyond the range": (lambda made: add(3, 20.0, made, GATE), rf"{GATE}: zeros are .* holds 1 to 16"),
    "a negative scale": (lambda made: spoil(made, f"{GATE}.scales", torch.neg), rf"{GATE}: scales must be positive"),
    "an infinite scale": (lambda made: spoil(made, f"{GATE}.scales", lambda t: t / 0), rf"{GATE}: scales must be"),
    "scales beyond float16": (
        lambda made: [spoil(made, f"{GATE}.{leaf}", lambda t: t * 1e9) for leaf in BOTH],
        rf"{GATE}: scales of 5.*e\+06 to .* do not fit float16",
    ),
    "words too few": (
        lambda made: spoil(made, f"{GATE}.qweight", lambda t: t[:7]),
        rf"{GATE}.weight has shape \[96, 56\] in .*, \[96, 64\] in the configuration",
    ),
    "columns too few": (
        lambda made: spoil(made, f"{GATE}.qweight", lambda t: t[:, :90]),
        rf"{GATE}.qweight has shape \[8, 90\]; it is \[a multiple of 1, 96\] at 4 bits and scales of \[96, 1\]",
    ),
    "scales of another shape": (
        lambda made: spoil(made, f"{GATE}.scales", lambda t: t[:, 0]),
        rf"{GATE}.scales has shape \[96\]; it is \[out, 1\]"
    ),
    "scales of more groups": (
        lambda made: [spoil(made, f"{GATE}.{leaf}", lambda t: t[:, None].repeat(1, 2, 1)) for leaf in BOTH],
        rf"{GATE}.scales has shape \[96, 2, 1\], which is 2 groups of 64 inputs; hyper_parameters say groupsize -1",
    ),
    "zeros of another shape": (
        lambda made: spoil(made, f"{GATE}.zeros", lambda t: t[:5]),
        rf"{GATE}.zeros has shape \[5, 1\], its scales \[96, 1\]"
    ),
    "words as floats": (lambda made: spoil(made, f"{GATE}.qweight", torch.Tensor.float), rf"{GATE}.qweight is float32"),
    "no words": (lambda made: made.content["model"].pop(f"{GATE}.qweight"), rf"lacks {GATE}.qweight"),
    "no scales": (lambda made: made.content["model"].pop(f"{GATE}.scales"), rf"{GATE} lacks scales"),
    "no norm": (lambda made: made.content["model"].pop("model.norm.weight"), r"lacks model.norm.weight of \d+ tensors"),
    "an adapter": (
        lambda made: made.content["model"].update({f"{GATE}.lora_A.weight": torch.ones(8, 64)}),
        rf"holds {GATE}.lora_A.weight \[8, 64\], which a Llama of 2 layers has not",
    ),
    "one module twice": (
        lambda made: made.content["model"].update({"model.decoder.norm.weight": torch.ones(HIDDEN)}),
        r"holds model.norm twice, as model.norm and as model.decoder.norm",
    ),
    "another width": (lambda made: made.content["layers_bit"].update({GATE: 8}), rf"layers_bit gives {GATE} 8 bits"),
    "a width that is wrong": (lambda made: made.content["layers_bit"].update({GATE: 2}), rf"{GATE}.weight has shape"),
    "no width": (lambda made: made.content["layers_bit"].pop(GATE), rf"{GATE}.qweight, which layers_bit does not list"),
    "no widths": (lambda made: made.content.pop("layers_bit"), r"does not say under 'layers_bit'"),
    "no group size": (lambda made: made.content.pop("hyper_parameters"), r"give groupsize None"),
    "no model": (lambda made: made.content.pop("model"), r"no state dict under 'model'"),
    "something else": (lambda made: made.content["model"].update({"step": 3}), r"'step' is int, not a tensor"),
}  # fmt: skip


@pytest.mark.parametrize(("spoiling", "message"), SPOILED.values(), ids=list(SPOILED))
def test_a_wrong_checkpoint_is_refused_and_leaves_nothing_behind(
    spoiling: Callable[[Made], object], message: str,
    write: Callable[[object], Path], config: Path, tmp_path: Path,
) -> None:  # fmt: skip
    made = make()
    spoiling(made)
    source = write(made.content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=message):
        convert(source, tmp_path / "out", config=config)
    assert sorted(tmp_path.iterdir()) == before


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    source, target = tmp_path / "bad.pt", tmp_path / "ran"
    content = {**make().content, "hyper_parameters": Malicious(target)}
    if kind == "pickle":
        source.write_bytes(pickle.dumps({"hyper_parameters": Malicious(target)}, protocol=2))
    else:
        torch.save(content, source, _use_new_zipfile_serialization=kind == "zip")
    message = (
        r"holds more than tensors and plain values( \(posix.system\))?; it was not loaded, for that could run code"
    )
    with pytest.raises(ModelError, match=message):
        convert(source, tmp_path / "out")
    assert not target.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off_is_refused(part: float, zipped: bool, tmp_path: Path) -> None:
    torch.save(make().content, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(part * len(data))])
    with pytest.raises(ModelError, match=r"cut.pt (is cut off|cannot be read|was not written by torch.save)"):
        convert(tmp_path / "cut.pt", tmp_path / "out")


def test_a_missing_file_and_an_out_that_exists_are_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file"):
        convert(tmp_path / "nothing.pt", tmp_path / "out")
    with pytest.raises(RunError, match="exists"):
        convert(tmp_path / "nothing.pt", config)
    assert (config / "config.json").is_file()


def test_without_config_a_model_of_unknown_shapes_is_refused(write: Callable[[object], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"2 layers, model.embed_tokens \[48, 64\].*\n.*--config FOLDER"):
        convert(write(make().content), tmp_path / "out")


@pytest.mark.parametrize("name", ["llama-7b", "llama-13b", "llama-33b", "llama-65b"])
def test_the_first_llamas_are_told_by_their_shapes(name: str, tmp_path: Path) -> None:
    known = config_of(name)
    hidden, layers = known["hidden_size"], known["num_hidden_layers"]
    empty = {
        "model.embed_tokens.weight": torch.empty(known["vocab_size"], hidden, device="meta", dtype=torch.float16),
        **{
            f"model.layers.{layer}.mlp.gate_proj.weight": torch.empty(
                known["intermediate_size"], hidden, device="meta", dtype=torch.float16
            )
            for layer in range(layers)
        },
    }
    found, notes = model_config(Checkpoint({}, empty, {}, frozenset(), -1, ()), None, tmp_path)
    assert found == {**known, "torch_dtype": "float16"}
    assert name in notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        (json.dumps({**CONFIG, "model_type": "opt"}), "is of model_type 'opt'; Sparsebit packs llama"),
        (json.dumps({**CONFIG, "num_hidden_layers": 3}), "lacks model.layers.2.*and 8 more"),
        (json.dumps({**CONFIG, "num_hidden_layers": 1}), "which a Llama of 1 layers has not"),
        (json.dumps({**CONFIG, "vocab_size": 50}), r"lm_head.weight has shape \[48, 64\] in .*, \[50, 64\] in the"),
    ],
)
def test_a_config_of_another_model_is_refused(
    content: str, message: str, write: Callable[[object], Path], config: Path, tmp_path: Path
) -> None:
    (config / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        convert(write(make().content), tmp_path / "out", config=config)


def test_alpaca_qloras_own_config_is_read(write: Callable[[object], Path], config: Path, tmp_path: Path) -> None:
    theirs = {key: value for key, value in CONFIG.items() if key != "max_position_embeddings"}
    theirs |= {"max_sequence_length": 64, "pad_token_id": -1, "bos_token_id": 0, "eos_token_id": 1}
    (config / "config.json").write_text(json.dumps({**theirs, "torch_dtype": "float16"}))
    done: Converted = convert(write(make().content), tmp_path / "out", config=config)
    assert done.layers == LAYERS
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 64


def test_a_full_disk_is_said_before_anything_is_written(
    write: Callable[[object], Path], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qdist.core.errors import PlanError

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    source = write(make().content)
    with pytest.raises(PlanError, match="free"):
        convert(source, tmp_path / "out", config=config)
