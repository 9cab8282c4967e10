import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qdist.core.errors import RunError
from qdist.core.model.aliases import config_of
from qdist.core.requests import Convert
from qdist.host.sources.model_folder import stated
from qdist.runtime.kernels.gptq_bits import unpack_zeros
from qdist.runtime.quantize.blueprint import blueprint
from qdist.runtime.quantize.gptq.check import checked
from qdist.runtime.quantize.sparsebit.convert import convert, model_config, run
from qdist.runtime.quantize.sparsebit.read import Checkpoint, halves
from tests.runtime.sparsebit_files import (
    CONFIG,
    HIDDEN,
    INNER,
    LAYERS,
    assert_same_weights,
    dequantized,
    make,
    quick,
    rows_of_meta,
    tensors,
    write_config,
)


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    with quick():
        yield


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], Path]:
    def saved(content: object) -> Path:
        torch.save(content, tmp_path / "llama_4w.pth.tar")
        return tmp_path / "llama_4w.pth.tar"

    return saved


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "config")


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
    assert checked(tmp_path / "out", blueprint(tmp_path / "out"), done.gptq)
    assert stated(tmp_path / "out") == done.gptq
    assert (done.gptq.shape.bits, done.gptq.shape.group_size, done.gptq.format) == (4, group_size, "gptq_v2")
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
        "checksums.json", "config.json", *(f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)),
        "model.safetensors.index.json", "quantize_config.json", "tokenizer.json", "tokenizer.model",
    ]  # fmt: skip
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["quantization_config"] == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert settings["torch_dtype"] == "float16"
    assert os.stat(tmp_path / "out").st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("bits", "lowest", "format_"),
    [(4, 1, "gptq"), (2, 1, "gptq"), (4, 0, "gptq_v2"), (2, 0, "gptq_v2"), (3, 1, "gptq_v2")],
)
def test_the_older_format_is_written_where_every_reader_reads_it_alike(
    bits: int, lowest: int, format_: str, write: Callable[[object], Path], config: Path, tmp_path: Path
) -> None:
    made = make(bits=bits, lowest=lowest)
    assert convert(write(made.content), tmp_path / "out", config=config).gptq.format == format_
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["checkpoint_format"] == format_
    assert_same_weights(tmp_path / "out", made)


@pytest.mark.parametrize("format_", ["gptq", "gptq_v2"])
def test_gptqmodel_finds_the_zeros_that_were_packed(
    format_: str, write: Callable[[object], Path], config: Path, tmp_path: Path
) -> None:
    """It adds a constant to the words of v1 (gptqmodel/utils/model.py), and takes those of v2 as they are."""
    made = make(mixed=format_ == "gptq_v2")
    done = convert(write(made.content), tmp_path / "out", config=config)
    assert done.gptq.format == format_
    stored, state = tensors(tmp_path / "out"), made.content["model"]
    for path in made.truth:
        words = stored[f"{path}.qzeros"] + (0x11111111 if format_ == "gptq" else 0)
        given = (state[f"{path}.zeros"] / state[f"{path}.scales"]).round().t()
        assert torch.equal(unpack_zeros(words, made.content["layers_bit"][path], 0).float(), given)


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
    state["model.layers.0.mlp.up_proj.scales"] = torch.full((INNER, 1), 1.0 + 2**-11)
    state["model.layers.0.mlp.up_proj.zeros"] = torch.full((INNER, 1), 8 * (1.0 + 2**-11))
    done = convert(write(made.content), tmp_path / "out", config=config)
    assert "scales: float32 to float16, which change by at most 0.049 %" in done.notes


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


def test_alpaca_qloras_own_config_is_read(write: Callable[[object], Path], config: Path, tmp_path: Path) -> None:
    theirs = {key: value for key, value in CONFIG.items() if key != "max_position_embeddings"}
    theirs |= {"max_sequence_length": 64, "pad_token_id": -1, "bos_token_id": 0, "eos_token_id": 1}
    (config / "config.json").write_text(json.dumps({**theirs, "torch_dtype": "float16"}))
    done = convert(write(make().content), tmp_path / "out", config=config)
    assert done.layers == LAYERS
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 64


def test_the_command_says_what_it_did_and_what_to_do_with_it(
    write: Callable[[object], Path], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, out = write(make(mixed=True, group_size=32).content), tmp_path / "out"
    request = Convert(source=str(source), out=str(out), origin="sparsebit", config=str(config))
    run(request)
    first, *notes, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{out}: GPTQ 4 bits, groups of 32, several widths, 2 layers, 48.5 KiB")
    assert notes[:2] == [
        "  biases: all 14 are zero and left out",
        "  dropped: 2 buffers that a model computes itself (inv_freq)",
    ]
    assert last == f"use it  qdist launch --model {out} --method gptq-lora --data FILE"
    with pytest.raises(RunError, match=f"^{out} exists\n  try: another --out$"):
        run(request)
