"""The kernels of a decoding step on a real GPU, against torch."""

import pytest
import torch

from qdist.runtime.kernels.decode_attention import torch_attention, torch_write, triton_attention, triton_write
from qdist.runtime.kernels.fp8 import FourBit
from qdist.runtime.kernels.small_product import (
    Gptq,
    Member,
    StackedAdapter,
    Tiles,
    counters,
    torch_products,
    triton_products,
)
from tests.runtime.kernels import packed_members as packed

OUTPUTS, RANKS, WIDTH = (200, 72, 72), (24, 0, 24), 576
ALLOWED = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error: of the code book and the results in the dtype."""
Weight = FourBit | Gptq


def on_gpu(weight: Weight) -> Weight:
    moved = [value.cuda() if isinstance(value, torch.Tensor) else value for value in weight]
    if isinstance(weight, FourBit) and weight.nested is not None:
        moved[2] = (weight.nested[0].cuda(), weight.nested[1].cuda())
    return type(weight)(*moved)


def packings() -> dict[str, list[Weight]]:
    made: dict[str, list[Weight]] = {"nf4": [], "fp4": [], "gptq 32": [], "gptq 64": [], "gptq": []}
    for seed, size in enumerate(OUTPUTS):
        made["nf4"].append(packed.four_bits(size, WIDTH, "nf4", nested=True, seed=seed))
        made["fp4"].append(packed.four_bits(size, WIDTH, "fp4", nested=False, seed=seed))
        made["gptq 32"].append(packed.gptq(size, WIDTH, 32, seed=seed))
        made["gptq 64"].append(packed.gptq(size, WIDTH, 64, seed=seed))
        made["gptq"].append(packed.gptq(size, WIDTH, -1, seed=seed))
    return {name: [on_gpu(weight) for weight in weights] for name, weights in made.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALLOWED)
def test_products_of_few_tokens_are_those_of_the_unpacked_weights(dtype: torch.dtype) -> None:
    for name, weights in packings().items():
        for tokens in (1, 3, 16, 17, 64):
            inputs = torch.randn(tokens, WIDTH, device="cuda").to(dtype)
            biases = [torch.randn(size, device="cuda").to(dtype) for size in OUTPUTS]
            members = [Member(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            there = packed.adapter(OUTPUTS, RANKS, WIDTH, tokens)
            mask = None if there.mask is None else there.mask.cuda()
            adapter = StackedAdapter(there.down.cuda().to(dtype), tuple(up.cuda().to(dtype) for up in there.ups), mask)
            exact = StackedAdapter(adapter.down.float(), tuple(up.float() for up in adapter.ups), mask)
            wanted = torch_products(inputs.float(), members, exact)
            found = triton_products(inputs, members, adapter)
            for product, right in zip(found, wanted, strict=True):
                assert float((product.float() - right).norm() / right.norm()) < ALLOWED[dtype], (name, tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_split_product_is_the_same_whoever_ends_last_and_leaves_no_counts(tokens: int) -> None:
    weight = on_gpu(packed.gptq(256, 4096, 128))
    inputs = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    tiles = Tiles(rows=64, depth=16, splits=8, warps=4, stages=2)
    first = triton_products(inputs, [Member(weight)], None, tiles=tiles)[0]
    for _ in range(100):
        assert torch.equal(triton_products(inputs, [Member(weight)], None, tiles=tiles)[0], first)
    assert not counters(inputs.device).any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("shape", [(4, 4, 64), (6, 2, 80), (8, 1, 128), (4, 2, 256)])
@pytest.mark.parametrize("splits", [1, 8])
def test_attention_is_torchs_over_the_keys_of_each_row(
    dtype: torch.dtype, shape: tuple[int, int, int], splits: int
) -> None:
    heads, shared, size = shape
    query = torch.randn(4, 1, heads, size, device="cuda", dtype=dtype).transpose(1, 2)
    keys, values = (torch.randn(5, shared, 300, size, device="cuda", dtype=dtype) for _ in range(2))
    keys[3], values[3] = float("nan"), float("nan")
    lengths = torch.tensor([1, 300, 150, 0], device="cuda")
    sinks = torch.randn(heads, device="cuda", dtype=dtype)
    for window, softcap, sink in ((0, None, None), (100, 5.0, sinks)):
        given = (query, keys, values, lengths, size**-0.5, window)
        found = triton_attention(*given, sinks=sink, softcap=softcap, splits=splits).float()
        wanted = torch_attention(*given, sinks=sink, softcap=softcap).float()
        assert float((found - wanted).norm() / wanted.norm()) < ALLOWED[dtype]
        assert not found[3].any()


@pytest.mark.gpu
def test_new_keys_and_values_are_written_as_torch_writes_them() -> None:
    new = [torch.randn(4, 1, 3, 80, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2)]
    wanted = [torch.zeros(6, 3, 32, 80, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    found = [cache.clone() for cache in wanted]
    lengths = torch.tensor([0, 31, 32, 7], device="cuda")
    torch_write(*new, *wanted, lengths)
    triton_write(*new, *found, lengths)
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))
