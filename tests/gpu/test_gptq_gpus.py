"""GPTQ's kernels on real GPUs, against torch's way on the CPU, and runs over GPTQ weights in every placement."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from qdist.core.model.gptq import Gptq, Shape
from qdist.core.requests import GptqSettings
from qdist.runtime.adapters.lora import adapted_product
from qdist.runtime.kernels import gptq_bits as reference
from qdist.runtime.kernels.gptq import triton_dequantize, triton_product
from qdist.runtime.kernels.gptq_solve import torch_fit, torch_round_block, triton_fit, triton_round_block
from qdist.runtime.model.packed_gptq import PackedGptq
from qdist.runtime.model.skeleton import fill
from qdist.runtime.model.weights import RandomWeights
from qdist.runtime.quantize.gptq import calibrate
from qdist.runtime.quantize.gptq import make as making
from qdist.runtime.quantize.gptq import solve as solving
from qdist.runtime.quantize.gptq.calibrate import add_products, mirror
from qdist.runtime.quantize.gptq.make import make
from qdist.runtime.quantize.gptq.solve import curvature, solve
from tests.gpu.conftest import Launch
from tests.gpu.test_placements import SHAPE, agree
from tests.runtime.data.test_tokenized import tiny_tokenizer
from tests.runtime.gptq_files import quantized
from tests.runtime.tiny import tiny_model

FORMS = [
    Gptq(shape=Shape(bits, size), sym=False, desc_act=ordered, format=stored)  # type: ignore[arg-type]
    for bits, size, ordered, stored in product((2, 3, 4, 8), (32, 128, -1), (False, True), ("gptq", "gptq_v2"))
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernels_compute_what_torch_does(dtype: torch.dtype) -> None:
    weight = torch.randn(1056, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    inputs = torch.randn(3, 512, device="cuda", dtype=dtype)
    for gptq in FORMS:
        there, bits, size = quantized(weight, gptq), gptq.shape.bits, gptq.shape.group_size
        given: dict[str, Any] = {"bits": bits, "offset": gptq.zero_offset}
        wanted = reference.dequantize(*there[:4], dtype=dtype, **given)
        packed = [tensor.cuda() for tensor in there[:3]]
        groups = there.g_idx.cuda() if gptq.desc_act else None
        found = triton_dequantize(*packed, groups, group_size=size, dtype=dtype, **given)
        assert torch.equal(found.cpu(), wanted), gptq
        exact = inputs.float() @ reference.dequantize(*there[:4], dtype=torch.float32, **given).cuda()
        near = triton_product(inputs, *packed, groups, group_size=size, **given).float()
        assert float((near - exact).norm() / exact.norm()) < (1e-5 if dtype == torch.float32 else 5e-3), gptq


@pytest.mark.gpu
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize(("rows", "outputs", "bits"), [(128, 1000, 4), (32, 4096, 2), (64, 96, 3), (20, 64, 8)])
def test_a_block_is_rounded_as_torch_rounds_it(rows: int, outputs: int, bits: int, by_column: bool) -> None:
    generator, top = torch.Generator().manual_seed(0), (1 << bits) - 1
    left = torch.randn(rows, outputs, generator=generator)
    inputs = torch.randn(4 * rows, rows, generator=generator)
    hessian = inputs.t() @ inputs / rows + 0.01 * torch.eye(rows)
    factor = torch.zeros(300, 300)
    factor[40 : 40 + rows, 40 : 40 + rows] = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    scale, zero = left.abs().amax(0) * 2 / top, torch.full((outputs,), float((top + 1) // 2))
    wanted = torch_round_block(left, factor[40 : 40 + rows, 40 : 40 + rows], scale, zero, top=top)
    there = factor.cuda()
    # By rows, or by columns, as GPUs solve triangular systems.
    upper = (there.t().contiguous().t() if by_column else there)[40 : 40 + rows, 40 : 40 + rows]
    found = triton_round_block(left.cuda(), upper, scale.cuda(), zero.cuda(), top=top)
    # A weight between two codes may fall to either, and takes those after it in its output along.
    same = (found.codes.cpu() == wanted.codes).all(0)
    assert float(same.float().mean()) > 0.99
    assert torch.allclose(found.errors.cpu()[:, same], wanted.errors[:, same], atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(("sym", "lowest_zero"), [(True, 0), (False, 0), (False, 1)])
@pytest.mark.parametrize(("rows", "outputs", "bits"), [(128, 1000, 4), (32, 4096, 2), (300, 96, 3), (20, 64, 8)])
def test_a_grid_is_fitted_as_torch_fits_it(
    rows: int, outputs: int, bits: int, sym: bool, lowest_zero: int, search: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights, importance = torch.randn(rows, outputs, generator=generator), torch.rand(rows, generator=generator) + 0.1
    weights[:, 0], weights[:, 1], weights[:, 2] = 0, weights[:, 1].abs(), 1e-9 * weights[:, 2]
    given: dict[str, Any] = {"bits": bits, "sym": sym, "lowest_zero": lowest_zero, "search": search}
    wanted = torch_fit(weights, importance, **given)
    found = triton_fit(weights.cuda(), importance.cuda(), **given)
    # Two parts of a range may cost the same to a rounding.
    same = (found.scale.cpu() == wanted.scale) & (found.zero.cpu() == wanted.zero)
    assert float(same.float().mean()) > 0.99
    assert bool(same[:3].all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [128, 2048])
def test_a_gpu_solves_and_sums_as_a_cpu_does(dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (calibrate, solving):
        monkeypatch.setattr(module, "_COLUMNS", columns)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 384, generator=generator)
    inputs = (torch.randn(2048, 384, generator=generator) @ torch.randn(384, 384, generator=generator)).to(dtype)
    sums = [torch.zeros(384, 384), torch.zeros(384, 384, device="cuda")]
    add_products(sums[0], inputs, 1e-3)
    add_products(sums[1], inputs.cuda(), 1e-3)
    for total in sums:
        mirror(total)
    exact = 1e-3 * inputs.double().t() @ inputs.double()
    assert float((sums[1].cpu() - exact).norm() / exact.norm()) < 1e-5
    assert float((sums[1].cpu() - sums[0]).norm() / sums[0].norm()) < 1e-5
    errors = []
    for total in sums:
        curve = curvature(total, by_activation=True, name="up")
        errors.append(solve(weight.to(total.device), curve, Shape(4, 128), sym=True, name="up").error)
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


class Killed(Exception):
    pass


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "bloom", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_is_the_same_to_the_byte_on_any_number_of_gpus_and_after_a_kill(
    tmp_path: Path, dtype: torch.dtype, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One GPU stands for two where there is no other."""
    source, text = tmp_path / "model", tmp_path / "text.txt"
    tiny_model(family).to(dtype).save_pretrained(source)
    tiny_tokenizer(bos=False).save_pretrained(source)
    letters = torch.randint(32, 127, (12000,), generator=torch.Generator().manual_seed(7))
    text.write_text("".join(map(chr, letters.tolist())))
    wanted = GptqSettings(data=str(text), samples=16, seq_len=64, group_size=32, bits=(2, 4), max_error=0.05)
    gpus = tuple(torch.device("cuda", number % torch.cuda.device_count()) for number in range(3))
    make(str(source), tmp_path / "one", wanted, devices=gpus[:1])
    make(str(source), tmp_path / "three", wanted, devices=gpus)
    write = making.write_tensors

    def killed(folder: Path, name: str, entries: Any) -> Any:
        if "00002" in name.split("-of-")[0]:
            raise Killed
        return write(folder, name, entries)

    with monkeypatch.context() as patch:
        patch.setattr(making, "write_tensors", killed)
        with pytest.raises(Killed):
            make(str(source), tmp_path / "resumed", wanted, devices=gpus[:1])
    make(str(source), tmp_path / "resumed", wanted, devices=gpus[:2])
    files = [path.name for path in (tmp_path / "one").iterdir()]
    for other in ("three", "resumed"):
        differ = [
            name for name in files if (tmp_path / "one" / name).read_bytes() != (tmp_path / other / name).read_bytes()
        ]
        assert differ == []


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # of torch's own thread, where it is the process's first
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_near_those_of_float32(dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    layer = PackedGptq(1024, 1536, bias=False, dtype=dtype, shape=Shape(4, 128), offset=1)
    fill(nn.ModuleDict({"linear": layer}), RandomWeights(device, dtype), device=device)
    torch.manual_seed(0)
    given = [torch.randn(64, 1024), 0.1 * torch.randn(8, 1024), 0.1 * torch.randn(1536, 8)]
    exact, rounded = ([leaf.to(device).requires_grad_() for leaf in given] for _ in range(2))
    outer = torch.randn(64, 1536, device=device)
    x, down, up = exact
    functional.linear(x, layer.matrix(torch.float32, device) + 0.5 * up @ down).backward(outer)
    with torch.autocast("cuda", dtype=dtype):
        product = adapted_product(*rounded, layer, 0.5)
    product.backward(outer.to(dtype))
    for near, wanted in zip(rounded, exact, strict=True):
        assert float((near.grad - wanted.grad).norm() / wanted.grad.norm()) < 1e-2


@pytest.mark.gpu2
@pytest.mark.parametrize("placement", ["replicate", "shard", "split"])
def test_every_placement_trains_the_same_adapter(launch: Launch, placement: str) -> None:
    shape = {**SHAPE, "method": "gptq-lora"}
    schedule = {"split.schedule": "1f1b"} if placement == "split" else {}
    run = launch(f"gptq-{placement}", gpus=2, placement=placement, **shape, **schedule)
    agree(run, launch("gptq-alone", **shape))
