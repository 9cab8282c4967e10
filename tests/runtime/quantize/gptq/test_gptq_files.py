"""What a GPTQ checkpoint holds is what is loaded, to the bit; what is wrong with one is named before a run starts."""

import json
import os
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qdist
from qdist.core.errors import ModelError
from qdist.core.model.families import from_config
from qdist.core.model.gptq import Gptq, Override, Shape
from qdist.core.planning.memory import TrainingShape, packed_layer_bytes
from qdist.host.sources.model_folder import stated
from qdist.runtime.formats.gptq_folder import entries
from qdist.runtime.formats.packed_folder import write_tensors
from qdist.runtime.kernels.gptq_bits import pack, pack_zeros, unpack, unpack_zeros
from qdist.runtime.model.packed_gptq import PackedGptq
from qdist.runtime.model.parts import decoder_layers
from qdist.runtime.model.skeleton import fill
from qdist.runtime.model.weights import FolderWeights
from qdist.runtime.quantize.blueprint import blueprint
from qdist.runtime.quantize.gptq import check
from tests.runtime.gptq_files import dequantized, quantized, save_gptq
from tests.runtime.tiny import FAMILIES, save_model

INPUTS, OUTPUTS = 128, 96
FORMS = [
    Gptq(shape=Shape(bits, size), sym=sym, desc_act=desc_act, format=stored)  # type: ignore[arg-type]
    for bits, size, sym, desc_act, stored in product(
        (2, 3, 4, 8), (32, 64, 128, -1), (True, False), (False, True), ("gptq", "gptq_v2")
    )
]
PLAIN = Gptq(shape=Shape(4, 32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_follow_each_other_bit_by_bit(bits: int) -> None:
    values = torch.randint(0, 1 << bits, (64, 5))
    packed = pack(values, bits)
    assert packed.shape == (2 * bits, 5)
    assert torch.equal(unpack(packed, bits).long(), values)
    for column in range(5):
        words = [int(word) & 0xFFFFFFFF for word in packed[:, column]]
        stream = sum(word << (32 * place) for place, word in enumerate(words))
        assert [(stream >> (bits * place)) & ((1 << bits) - 1) for place in range(64)] == values[:, column].tolist()


def test_a_zero_of_0_has_no_place_in_v1() -> None:
    zeros = torch.tensor([[3, 0, 5, 1, 2, 9, 15, 4]])
    with pytest.raises(ModelError, match="1 zeros are 0, which the format gptq cannot hold"):
        pack_zeros(zeros, 4, 1, name="x.qzeros")
    assert torch.equal(unpack_zeros(pack_zeros(zeros, 4, 0), 4, 0), zeros.short())


@pytest.mark.parametrize("value", [16, -1])
def test_what_does_not_fit_is_not_packed(value: int) -> None:
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        pack(torch.full((8, 1), value), 4)


def test_every_form_is_loaded_and_written_again_to_the_bit(tmp_path: Path) -> None:
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)) * 0.05
    for number, gptq in enumerate(FORMS):
        folder = tmp_path / str(number)
        folder.mkdir()
        there = quantized(weight, gptq)
        write_tensors(folder, "model.safetensors", entries("linear", there))
        layer = PackedGptq(
            INPUTS, OUTPUTS, bias=False, dtype=torch.float32, shape=gptq.shape, offset=gptq.zero_offset,
            ordered=gptq.desc_act,
        )  # fmt: skip
        fill(nn.ModuleDict({"linear": layer}), FolderWeights(folder), device=torch.device("cpu"))
        for name, loaded in (("qweight", layer.weight), ("qzeros", layer.qzeros), ("scales", layer.scales)):
            assert torch.equal(loaded.data, getattr(there, name)), (gptq, name)
        assert layer.g_idx is None or torch.equal(layer.g_idx, there.g_idx)
        values, zeros = unpack(there.qweight, gptq.shape.bits), unpack_zeros(there.qzeros, gptq.shape.bits, 0)
        assert torch.equal(pack(values, gptq.shape.bits), there.qweight)
        assert torch.equal(pack_zeros(zeros, gptq.shape.bits, 0), there.qzeros)
        rows = there.g_idx.long()
        wanted = (values.float() - zeros[rows] - gptq.zero_offset) * there.scales.float()[rows]
        assert torch.equal(layer.matrix(torch.float32, torch.device("cpu")), wanted.t())
        # Half a step; float16 scales, and zeros that v1 has to raise, cost a little more.
        assert float((wanted.t() - weight).abs().max()) < 1.6 * float(there.scales.float().max())
    assert len(FORMS) == 128


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_computes_what_its_values_say(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    gptq = Gptq(shape=Shape(4, 32), sym=False, desc_act=True, format="gptq_v2")
    folder = save_gptq(tmp_path / "gptq", gptq, family)
    model, tokenizer = qdist.load(folder, dtype="float32")
    assert tokenizer is not None
    assert any(isinstance(module, PackedGptq) for module in model.modules())
    plain = dequantized(model, AutoModelForCausalLM.from_pretrained(tmp_path / "gptq-source", dtype=torch.float32))
    ids = torch.arange(2, 40).reshape(2, 19)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=2e-3, atol=2e-3)


def test_linears_of_several_widths_load_as_their_overrides_say(tmp_path: Path) -> None:
    overrides = (
        Override(r"model\.layers\.0\.mlp\.up_proj$", Shape(3, 32)),
        Override(r".*\.layers\.1\.self_attn\.[qk]_proj$", Shape(2, 64)),
        Override(r".*v_proj$", None),
    )
    gptq = msgspec.structs.replace(PLAIN, overrides=overrides, format="gptq_v2")
    folder = save_gptq(tmp_path / "mixed", gptq)
    found = stated(folder)
    assert found == gptq
    model, _ = qdist.load(folder)
    widths = [
        getattr(getattr(model.get_submodule(f"model.layers.{path}"), "shape", None), "bits", 16)
        for path in ("0.mlp.up_proj", "1.mlp.up_proj", "1.self_attn.q_proj", "0.self_attn.q_proj", "0.self_attn.v_proj")
    ]
    assert widths == [3, 4, 2, 4, 16]
    facts = from_config(json.loads((folder / "config.json").read_text()), name="mixed")
    told = check.checked(folder, blueprint(folder), gptq)
    job = TrainingShape(bits=4, gptq=told, compute_bytes=2, rank_r=1, targets=("all-linear",), seq_len=8)
    held = [
        sum(value.numel() * value.element_size() for value in layer.parameters()) for layer in decoder_layers(model)
    ]
    assert packed_layer_bytes(facts.shapes[0], job) == max(held)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layer_holds_the_bytes_that_were_predicted(tmp_path: Path, bits: Any, desc_act: bool) -> None:
    gptq = Gptq(shape=Shape(bits, 32), desc_act=desc_act)
    folder = save_gptq(tmp_path / "gptq", gptq)
    model, _ = qdist.load(folder)
    facts = from_config(json.loads((folder / "config.json").read_text()), name="gptq")
    job = TrainingShape(bits=4, gptq=gptq, compute_bytes=2, rank_r=1, targets=("all-linear",), seq_len=8)
    layer = decoder_layers(model)[0]
    indices = [module.g_idx for module in layer.modules() if getattr(module, "g_idx", None) is not None]
    held = sum(value.numel() * value.element_size() for value in (*layer.parameters(), *indices))
    assert packed_layer_bytes(facts.shapes[0], job) == held


UP = "model.layers.1.mlp.up_proj"


def _spoil(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _first(value: Any) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


SPOILT: dict[str, tuple[str, Any, str]] = {
    "wrong shape": (f"{UP}.qweight", lambda tensor: tensor[:-1], f"{UP}.qweight has shape .*7, 128.*8, 128"),
    "wrong type": (f"{UP}.qzeros", torch.Tensor.long, f"{UP}.qzeros is stored as I64, not I32"),
    "no group": (f"{UP}.g_idx", _first(9), f"{UP}.g_idx goes from 0 to 9, and there are 2 groups"),
    "negative group": (f"{UP}.g_idx", _first(-1), f"{UP}.g_idx goes from -1 to 1"),
    "NaN": (f"{UP}.scales", _first(float("nan")), f"{UP}.scales holds 1 values that are no numbers"),
    "infinite": (f"{UP}.scales", _first(float("inf")), f"{UP}.scales holds 1 values that are no numbers"),
    "norm": ("model.norm.weight", lambda tensor: tensor[:-3], "model.norm.weight has shape .61., and .64. is"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gptq(tmp_path_factory.mktemp("gptq") / "whole", PLAIN)


def refused(folder: Path, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        qdist.load(folder)
    assert caught.value.try_


@pytest.mark.parametrize("what", SPOILT)
def test_a_wrong_tensor_is_named(whole: Path, tmp_path: Path, what: str) -> None:
    name, change, says = SPOILT[what]
    folder = shutil.copytree(whole, tmp_path / "spoilt")
    _spoil(folder, name, change)
    refused(folder, says)


def test_a_missing_tensor_and_a_file_cut_short_are_named(whole: Path, tmp_path: Path) -> None:
    lacking, cut = (shutil.copytree(whole, tmp_path / name) for name in ("lacking", "cut"))
    tensors = load_file(lacking / "model.safetensors")
    del tensors[f"{UP}.scales"]
    save_file(tensors, lacking / "model.safetensors")
    (lacking / "model.safetensors.index.json").unlink()
    refused(lacking, f"has no tensor {UP}.scales")
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(cut, "model.safetensors")


def _stated(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(config["quantization_config"]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 8}, "qweight has shape"),
        ({"bits": 5}, "bits is 5; GPTQ has 2, 3, 4 or 8"),
        ({"group_size": 64}, "qzeros has shape"),
        ({"group_size": 0}, "group_size is 0; it is -1 or a positive number"),
        ({"checkpoint_format": "marlin"}, "is stored in the format 'marlin'"),
        ({"checkpoint_format": "gptq_v2"}, "says that it is in the format gptq_v2, and its zeros are those of gptq"),
        ({"lm_head": True}, "its lm_head is quantized"),
        ({"sym": "yes"}, "sym is 'yes'"),
        ({"dynamic": {"+:[": {}}}, "is not a regular expression"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_named(whole: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "spoilt")
    _stated(folder, **changes)
    refused(folder, says)


def test_asymmetric_zeros_give_a_wrong_v1_away_where_they_can(tmp_path: Path) -> None:
    """15 as stored would stand for 16."""
    folder = save_gptq(tmp_path / "v2", Gptq(shape=Shape(4, 32), sym=False, format="gptq_v2"))
    _spoil(folder, f"{UP}.qzeros", lambda tensor: torch.full_like(tensor, -1))
    _stated(folder, checkpoint_format="gptq", format="gptq")
    refused(folder, "its zeros are those of gptq_v2")


def test_two_configurations_that_contradict_each_other_are_refused(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "two")
    other = json.loads((folder / "quantize_config.json").read_text()) | {"group_size": 64}
    (folder / "quantize_config.json").write_text(json.dumps(other))
    refused(folder, "groups of 32 .* groups of 64")


def test_an_old_checkpoint_has_a_quantize_config_alone(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    ids = torch.arange(2, 30).unsqueeze(0)
    with torch.no_grad():
        one, other = (qdist.load(each, dtype="float32")[0](ids).logits for each in (folder, whole))
    assert torch.equal(one, other)


class Trap:
    """What a pickle could run."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(os.environ["TRAP"]),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "gptq_model-4bit-32g.pt"])
def test_an_old_file_is_read_as_tensors_alone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    folder = shutil.copytree(whole, tmp_path / "old")
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    torch.save(tensors, folder / name)
    ids = torch.arange(2, 30).unsqueeze(0)
    with torch.no_grad():
        one, other = (qdist.load(each, dtype="float32")[0](ids).logits for each in (folder, whole))
    assert torch.equal(one, other)
    torch.save(tensors | {"more": Trap()}, folder / name)
    refused(folder, f"{name} holds more than tensors, and nothing of it was run")
    assert not (tmp_path / "sprung").exists()
    (folder / name).write_bytes((folder / name).read_bytes()[:2000])
    refused(folder, name)
    torch.save([1, 2], folder / name)
    refused(folder, "is not a table of tensors by name")


REFERENCE = Path(__file__).parents[5] / "shared/data/gptq_sym_g128"


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"{REFERENCE.name} is not beside this checkout")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gptqmodels_own_logits_are_reached(dtype: str) -> None:
    wanted = torch.load(REFERENCE / "reference.pt", weights_only=True)
    model, _ = qdist.load(REFERENCE, dtype=dtype)
    with torch.no_grad():
        logits = model(wanted["input_ids"]).logits.float()
    assert float((logits - wanted["logits"]).abs().max() / wanted["logits"].abs().max()) < 3e-3


def test_a_plain_model_is_no_checkpoint(tmp_path: Path) -> None:
    assert stated(save_model(tmp_path / "plain")) is None
