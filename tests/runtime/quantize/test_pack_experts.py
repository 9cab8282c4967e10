"""Experts are packed a matrix at a time, byte for byte what bitsandbytes makes of each; what comes packed stays so."""

from pathlib import Path

import pytest
import torch

from qdist.core.model.storage import Packing
from qdist.runtime.formats.packed_folder import read_manifest
from qdist.runtime.formats.packing import pack_experts, packed_experts_bytes
from qdist.runtime.quantize.bitsandbytes import packed_folder, quantize
from qdist.runtime.quantize.blueprint import blueprint
from qdist.runtime.quantize.pack import PackJob
from qdist.runtime.quantize.tensors import tensors_of
from tests.runtime.moe_models import store_as_mxfp4
from tests.runtime.quantize.test_bitsandbytes import CPU, each_packing, tensors_in
from tests.runtime.quantize.test_tensors import config_of, whole_model

EXPERTS = "model.layers.1.mlp.experts"


@each_packing
def test_each_expert_is_packed_to_the_bytes_that_bitsandbytes_makes_of_it(packing: Packing) -> None:
    """With 63 x 37 weights: neither blocks of 64 nor nested blocks of 256 are full."""
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    parameter = torch.randn(3, 63, 37, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    packed = pack_experts(parameter, packing, CPU)
    for expert in range(3):
        if packing.bits == 8:
            rows, scale, _ = int8_vectorwise_quant(parameter[expert].half())
            expected = {".weight": rows, ".scale": scale}
        else:
            values, state = quantize_4bit(
                parameter[expert].contiguous(), quant_type=packing.type, compress_statistics=packing.double
            )
            expected = {".weight": values.flatten(), ".absmax": state.absmax}
            if packing.double:
                expected |= {".nested_absmax": state.state2.absmax, ".nested_offset": state.offset}
        assert {suffix: torch.equal(packed[suffix][expert], value) for suffix, value in expected.items()} == (
            dict.fromkeys(packed, True)
        )
    held = sum(value.numel() * value.element_size() for value in packed.values())
    assert held == packed_experts_bytes((3, 63, 37), packing)


@each_packing
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_packed_folder_has_its_experts_packed_and_the_rest_as_it_was(
    tmp_path: Path, family: str, packing: Packing
) -> None:
    model = whole_model(config_of(family))
    model.save_pretrained(tmp_path / "source")
    manifest = quantize(str(tmp_path / "source"), tmp_path / "packed", packing)
    ours, held = tensors_in(tmp_path / "packed"), model.state_dict()
    for name in (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"):
        expected = pack_experts(held[name], packing, CPU)
        assert all(torch.equal(ours[name + suffix], value) for suffix, value in expected.items())
        assert name not in ours
    router = f"model.layers.1.mlp.{'router' if family == 'gpt_oss' else 'gate'}.weight"
    plain = [router, "model.layers.0.input_layernorm.weight", "lm_head.weight"]
    biases = [name for name in held if "experts" in name and name.endswith("bias")]
    assert len(biases) == (4 if family == "gpt_oss" else 0)
    assert all(torch.equal(ours[name], held[name]) for name in (*plain, *biases))
    assert read_manifest(tmp_path / "packed") == manifest
    assert manifest.note.startswith("4 parameters of experts packed too")
    assert packed_folder(tmp_path / "packed", packing, name="it").folder == tmp_path / "packed"


@each_packing
def test_the_bytes_of_a_file_are_known_before_it_is_written(tmp_path: Path, packing: Packing) -> None:
    whole_model(config_of("qwen3_moe")).save_pretrained(tmp_path / "source")
    shape = blueprint(tmp_path / "source")
    job = PackJob(tmp_path / "source", packing, shape, tensors_of(tmp_path / "source", shape))
    manifest = quantize(str(tmp_path / "source"), tmp_path / "packed", packing)
    for position, size in enumerate(manifest.files.values()):
        tensors = sum(value.numel() * value.element_size() for value in _tensors(tmp_path, position).values())
        assert tensors < size <= job.bytes(position)


def _tensors(folder: Path, position: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = load_file(folder / "packed" / f"model-{position + 1:05d}-of-00003.safetensors")
    return found


def as_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """gpt-oss as the hub has it: experts in blocks and scales, everything else in bfloat16."""
    whole_model(config_of("gpt_oss", intermediate_size=64), dtype=torch.bfloat16).save_pretrained(folder)
    return store_as_mxfp4(folder)


def test_mxfp4_is_used_as_it_comes(tmp_path: Path) -> None:
    stored = as_mxfp4(tmp_path)
    shape = blueprint(tmp_path)
    tensors = tensors_of(tmp_path, shape)
    assert packed_folder(tmp_path, Packing(bits=4, type="mxfp4", double=False), name="it").folder == tmp_path
    assert set(shape.shapes) == set(stored)
    assert not shape.linears | shape.experts
    assert [name for name, value in stored.items() if not torch.equal(tensors.read(name), value)] == []
