"""Experts are packed as bitsandbytes packs each matrix alone, and MXFP4 is read as transformers reads it."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qdist.core.spec.sections import Quant
from qdist.runtime.model.packed import DEVIATION
from qdist.runtime.model.packed_experts import (
    Matrices4bit,
    Matrices8bit,
    MatricesMxfp4,
    PackedMatrices,
    packed_matrices,
)
from qdist.runtime.model.skeleton import fill
from qdist.runtime.model.weights import FolderWeights, ModelWeights, RandomWeights

CPU = torch.device("cpu")
EVERYTHING = slice(None)
SHAPES = [(3, 64, 128), (4, 20, 33), (2, 130, 192)]
"""Whole blocks in 2 nested blocks or less; a part of a block; blocks that are no multiple of a nested block."""
FOUR_BIT = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


def parameter_of(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def filled(module: PackedMatrices, parameter: torch.Tensor) -> PackedMatrices:
    """The module with a parameter that is packed while it is loaded."""
    plain = nn.Module()
    plain.experts = nn.Module()
    plain.experts.gate_up_proj = nn.Parameter(parameter)
    return loaded(module, ModelWeights(plain, device=CPU, dtype=torch.float32))


def loaded(module: PackedMatrices, weights: Any) -> PackedMatrices:
    fill(nn.ModuleDict({"experts": nn.ModuleDict({"gate_up_proj": module})}), weights, device=CPU)
    return module


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("quant_type", "double"), FOUR_BIT)
def test_bytes_of_each_expert_are_those_of_bitsandbytes(shape: Any, quant_type: Any, double: bool) -> None:
    parameter = parameter_of(shape)
    ours = filled(Matrices4bit(shape, transposed=False, quant=Quant(type=quant_type, double=double)), parameter)
    unpacked = ours.held(EVERYTHING, torch.float32, CPU)
    for expert, matrix in enumerate(parameter):
        packed, state = bnb.functional.quantize_4bit(matrix, quant_type=quant_type, compress_statistics=double)
        assert torch.equal(ours.weight[expert], packed.flatten())
        assert torch.equal(ours.absmax[expert], state.absmax)
        if double:
            assert torch.equal(ours.nested_absmax[expert], state.state2.absmax)
            assert torch.equal(ours.nested_offset[expert], state.offset)
        assert torch.equal(unpacked[expert], bnb.functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_of_each_int8_expert_are_those_of_bitsandbytes(shape: Any) -> None:
    parameter = parameter_of(shape)
    ours = filled(Matrices8bit(shape, transposed=False), parameter)
    for expert, matrix in enumerate(parameter):
        packed, scale, _ = bnb.functional.int8_vectorwise_quant(matrix.to(torch.float16))
        assert torch.equal(ours.weight[expert], packed)
        assert torch.equal(ours.scale[expert], scale)
    torch.testing.assert_close(ours.held(EVERYTHING, torch.float32, CPU), parameter, atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [True, False])
def test_mxfp4_is_read_as_transformers_reads_it(dtype: torch.dtype, transposed: bool) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 40, 17, 16), dtype=torch.uint8, generator=generator)
    scales = torch.arange(3 * 40 * 17).remainder(255).to(torch.uint8).view(3, 40, 17)
    inputs, outputs = 17 * 32, 40
    ours = MatricesMxfp4((3, inputs, outputs) if transposed else (3, outputs, inputs), transposed=transposed)
    ours.blocks, ours.scales = (nn.Parameter(held, requires_grad=False) for held in (blocks, scales))
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    held = ours.held(EVERYTHING, dtype, CPU)
    assert torch.equal(held if transposed else held.transpose(1, 2), theirs)
    assert torch.equal(ours.of(slice(1, 2), dtype, CPU), theirs[1:2].transpose(1, 2))


KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "quant": Quant()},
    "fp4": {"bits": 4, "quant": Quant(type="fp4", double=False)},
    "int8": {"bits": 8, "quant": Quant()},
    "mxfp4": {"bits": 4, "quant": Quant(), "mxfp4": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_random_experts_have_the_deviation_of_random_linears(kind: str) -> None:
    random = RandomWeights(CPU, torch.float32)
    one, other = (loaded(packed_matrices((4, 96, 128), transposed=False, **KINDS[kind]), random) for _ in range(2))
    values = one.held(EVERYTHING, torch.float32, CPU)
    assert float(values.std()) == pytest.approx(DEVIATION, rel=0.25)
    assert abs(float(values.mean())) < DEVIATION / 10
    assert torch.equal(values, other.held(EVERYTHING, torch.float32, CPU))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_read_from_a_folder_under_the_names_of_their_parameters(kind: str, tmp_path: Any) -> None:
    before, after = (packed_matrices((4, 64, 128), transposed=True, **KINDS[kind]) for _ in range(2))
    loaded(before, RandomWeights(CPU, torch.float32))
    joint = "_" if kind == "mxfp4" else "."
    tensors = {f"experts.gate_up_proj{joint}{name}": value for name, value in named_tensors(before).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    loaded(after, FolderWeights(tmp_path))
    for name, value in named_tensors(after).items():
        assert torch.equal(value, tensors[f"experts.gate_up_proj{joint}{name}"])


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}


def test_every_tensor_of_packed_experts_has_a_row_an_expert_and_needs_no_gradient() -> None:
    for kind in KINDS.values():
        module = packed_matrices((5, 64, 128), transposed=False, **kind)
        assert all(len(value) == 5 for value in named_tensors(module).values())
        assert not any(parameter.requires_grad for parameter in module.parameters())
