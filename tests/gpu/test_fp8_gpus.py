"""Products in fp8 on real GPUs: kernels against torch's way on the CPU, inside CUDA graphs, and runs with them."""

from typing import Any

import pytest
import torch

from qdist.core.telemetry.events import losses
from qdist.host.run.rundir import RunDir
from qdist.runtime.adapters.lora import adapted_product
from qdist.runtime.kernels.fp8 import Scaled, convert, quantize_tokens, scale_of
from qdist.runtime.model.packed import PackedLinear
from tests.gpu.conftest import Launch
from tests.gpu.test_gpu import events
from tests.gpu.test_placements import SHAPE, agree
from tests.runtime.model.test_fp8 import INPUTS, KINDS, OUTPUTS, activations, cosine, linear

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def multiplies_in_fp8() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 on this GPU")


def same(found: Scaled, wanted: Scaled) -> None:
    """Equal scales; equal values but for a few that are rounded the other way, from a quotient of another last bit."""
    torch.testing.assert_close(found.scale.cpu(), wanted.scale, rtol=1e-6, atol=0)
    assert found.values.is_contiguous()
    here, there = found.values.cpu().float(), wanted.values.float()
    assert float((here != there).float().mean()) < 0.01
    torch.testing.assert_close(here, there, rtol=0.126, atol=2**-9)


@pytest.mark.parametrize("width", [64, 100, 4096, 22016])
@pytest.mark.parametrize("scaled", [False, True])
def test_tokens_are_quantized_as_torch_does_it(width: int, scaled: bool) -> None:
    given, factors = activations(width), torch.rand(width) + 0.1 if scaled else None
    same(quantize_tokens(given.cuda(), None if factors is None else factors.cuda()), quantize_tokens(given, factors))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(160, 192), (144, 4096), (4096, 16)])
def test_matrices_of_any_strides_are_converted_as_torch_does_it(shape: tuple[int, int], transposed: bool) -> None:
    for matrix in (torch.randn(shape).bfloat16(), torch.randn(shape[::-1]).bfloat16().t()):
        scale = scale_of(matrix.abs().amax(1))
        same(convert(matrix.cuda(), scale.cuda(), transposed=transposed), convert(matrix, scale, transposed=transposed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_weights_become_what_torch_makes_of_them(kind: str, transposed: bool) -> None:
    layer = linear(kind)
    weights = layer.unpacked(CPU)
    found = layer.cuda().in_fp8(GPU, transposed=transposed)
    values = (found.values.t() if transposed else found.values).float()
    assert float(values.abs().max()) <= 448
    assert cosine((values * found.scale.unsqueeze(1)).cpu(), weights) > 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_near_those_in_16_bits(kind: str) -> None:
    layer = linear(kind, bias=True).cuda()
    inputs, outer = activations(layer.in_features).cuda(), activations(OUTPUTS).cuda()
    wanted, wanted_gradient = layer.product(inputs), layer.input_gradient(outer)
    layer.compute = "fp8"
    assert 0.998 < cosine(layer.product(inputs), wanted) < 0.99999
    assert 0.998 < cosine(layer.input_gradient(outer), wanted_gradient) < 0.99999


def test_a_graph_replays_both_passes() -> None:
    layer = linear("nf4").cuda()
    layer.compute = "fp8"
    down, up = (torch.randn(shape, device=GPU).requires_grad_() for shape in ((8, INPUTS), (OUTPUTS, 8)))
    inputs, outer = activations(INPUTS).cuda().requires_grad_(), activations(OUTPUTS).cuda()

    def passes() -> tuple[torch.Tensor, ...]:
        product = adapted_product(inputs, down, up, layer, 0.01)
        return (product.detach(), *torch.autograd.grad(product, (inputs, down, up), outer))

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        passes()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = passes()
    inputs.data.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for found, wanted in zip(captured, passes(), strict=True):
        assert torch.equal(found, wanted)


def test_scales_that_a_capture_would_compute_are_not_kept() -> None:
    linear("nf4").cuda().in_fp8(GPU, transposed=False)  # compiles
    layer, graph = linear("nf4").cuda(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.in_fp8(GPU, transposed=False)
    found = layer.in_fp8(GPU, transposed=False)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found.scale, captured.scale)
    assert torch.equal(found.values.float(), captured.values.float())
    assert layer.in_fp8(GPU, transposed=True).scale is found.scale


def in_fp8(launch: Launch, name: str, **settings: Any) -> RunDir:
    run = launch(f"fp8-{name}", **{**SHAPE, "compute": "fp8", **settings})
    assert any("products in fp8" in event.note for event in events(run))
    return run


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_in_fp8_learns_like_one_in_16_bits(launch: Launch, checkpointing: bool) -> None:
    settings = {"train.checkpointing": checkpointing}
    run = in_fp8(launch, f"alone-{checkpointing}", **settings)
    plain = launch(f"plain-{checkpointing}", **{**SHAPE, **settings})
    found, wanted = (list(losses(events(each)).values()) for each in (run, plain))
    assert found == pytest.approx(wanted, rel=1e-2)
    assert found != wanted


@pytest.mark.gpu2
@pytest.mark.parametrize("placement", ["shard", "split"])
def test_placements_train_the_adapter_of_one_gpu_in_fp8(launch: Launch, placement: str) -> None:
    run = in_fp8(launch, placement, gpus=2, placement=placement, gpus_per_group=2)
    assert run.plan().placement == placement
    agree(run, in_fp8(launch, "alone-False", **{"train.checkpointing": False}))


def test_offloaded_layers_multiply_in_fp8_too(launch: Launch) -> None:
    away = {"placement": "split", "split.schedule": "sequential", "split.offload_layers": 2}
    agree(in_fp8(launch, "offload", **away), in_fp8(launch, "alone-False", **{"train.checkpointing": False}))


def test_layers_that_are_evaluated_multiply_in_16_bits() -> None:
    layer: PackedLinear = linear("nf4").cuda()
    inputs = activations(INPUTS).cuda()
    wanted = layer.product(inputs)
    layer.compute = "fp8"
    assert torch.equal(layer.eval().product(inputs), wanted)
