"""QA-LoRA on real GPUs: products near float32's, every placement alike, and merged weights that keep small offsets."""

import pytest
import torch
from torch import nn

from qdist.core.model.gptq import Shape, WeightOffset
from qdist.runtime.adapters.lora import adapted_product
from qdist.runtime.kernels.gptq import FEW_TOKENS
from qdist.runtime.kernels.pooling import triton_means
from qdist.runtime.model.packed_gptq import PackedGptq
from qdist.runtime.model.skeleton import fill
from qdist.runtime.model.weights import RandomWeights
from tests.gpu.conftest import Launch
from tests.gpu.test_placements import SHAPE, agree

POOL = 32


def layer_on(device: torch.device, dtype: torch.dtype) -> PackedGptq:
    layer = PackedGptq(1024, 1536, bias=False, dtype=dtype, shape=Shape(4, POOL), offset=1)
    fill(nn.ModuleDict({"linear": layer}), RandomWeights(device, dtype), device=device)
    return layer


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_near_those_of_float32(dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    layer = layer_on(device, dtype)
    torch.manual_seed(0)
    given = [torch.randn(64, 1024), torch.randn(8, 1024 // POOL), 0.1 * torch.randn(1536, 8)]
    exact, rounded = ([leaf.to(device).requires_grad_() for leaf in given] for _ in range(2))
    outer = torch.randn(64, 1536, device=device)
    x, down, up = exact
    update = (up @ down).repeat_interleave(POOL, dim=1) / POOL
    nn.functional.linear(x, layer.matrix(torch.float32, device) + 0.5 * update).backward(outer)
    with torch.autocast("cuda", dtype=dtype):
        product = adapted_product(*rounded, layer, 0.5)
    product.backward(outer.to(dtype))
    for near, wanted in zip(rounded, exact, strict=True):
        assert float((near.grad - wanted.grad).norm() / wanted.grad.norm()) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_pooling_kernel_computes_what_torch_does(dtype: torch.dtype) -> None:
    for pool, tokens in ((16, 5), (32, 4097), (128, 1000)):
        inputs = torch.randn(tokens, 4096, device="cuda").to(dtype)
        exact = inputs.double().view(tokens, -1, pool).mean(-1)
        largest = float((triton_means(inputs, pool).double() - exact).abs().max())
        assert largest < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_offsets_are_not_lost_in_the_rounding_of_weights(tokens: int, dtype: torch.dtype) -> None:
    """Offsets of 2 % of a scale: what the merged layer adds is the offsets' product to 1 %, in both kinds of kernel."""
    device = torch.device("cuda", 0)
    plain = layer_on(device, dtype)
    shift = WeightOffset(group_size=POOL, scale=2.0**-12, linears=("linear",), base="")
    merged = PackedGptq(1024, 1536, bias=False, dtype=dtype, shape=Shape(4, POOL), offset=1, shift=shift)
    for name, value in plain.named_parameters():
        setattr(merged, name, value)
    offsets = 0.02 * plain.scales.float() * torch.randn_like(plain.scales.float())
    merged.weight_offset = nn.Parameter((offsets / shift.scale).half(), requires_grad=False)
    inputs = torch.ones(tokens, 1024, device=device, dtype=dtype) + 0.1 * torch.randn(
        tokens, 1024, device=device, dtype=dtype
    )
    wanted = inputs.float().view(tokens, -1, POOL).sum(-1) @ offsets
    added = merged.product(inputs).float() - plain.product(inputs).float()
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    allowed = 0.01 * float(wanted.norm()) + rounding * float(plain.product(inputs).float().norm())
    assert float((added - wanted).norm()) < allowed


@pytest.mark.gpu2
@pytest.mark.parametrize("placement", ["replicate", "shard", "split"])
def test_every_placement_trains_the_same_adapter(launch: Launch, placement: str) -> None:
    shape = {**SHAPE, "method": "qa-lora", "quant.group_size": POOL}
    schedule = {"split.schedule": "1f1b"} if placement == "split" else {}
    run = launch(f"qa-{placement}", gpus=2, placement=placement, **shape, **schedule)
    agree(run, launch("qa-alone", **shape))
