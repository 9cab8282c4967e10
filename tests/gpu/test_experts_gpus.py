"""Experts on a GPU: Triton's unpacking beside torch's, grouped products beside one expert at a time."""

from typing import Any

import pytest
import torch

from qdist.core.spec.sections import Quant
from qdist.runtime.kernels import mxfp4
from qdist.runtime.kernels.four_bit import dequantize_matrices, dequantize_matrices_reference
from qdist.runtime.kernels.grouped import Pairs, has_kernel, outer_products, products
from qdist.runtime.model.packed_experts import packed_matrices

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda:0")


@pytest.mark.parametrize("shape", [(5, 192, 128), (3, 40, 64), (2, 1536, 2048), (7, 96, 36)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_matrices_of_experts_are_unpacked_as_bitsandbytes_does(
    shape: tuple[int, int, int], kind: Any, dtype: torch.dtype
) -> None:
    held = packed_matrices(shape, transposed=False, bits=4, quant=Quant(type=kind))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed = held.pack(values, CUDA, torch.bfloat16)
    given = (packed["weight"], packed["absmax"], (packed["nested_absmax"], packed["nested_offset"]))
    ours = dequantize_matrices(*given, quant_type=kind, shape=shape, dtype=dtype)
    theirs = dequantize_matrices_reference(*given, quant_type=kind, shape=shape, dtype=dtype)
    if dtype == torch.bfloat16:
        assert torch.equal(ours, theirs)
    # Triton multiplies and adds an absmax's offset in one rounding, bitsandbytes in two: seen in more digits.
    torch.testing.assert_close(ours, theirs, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mxfp4_is_unpacked_as_on_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (3, 96, 90, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 132, (3, 96, 90), dtype=torch.uint8, generator=generator)
    ours = mxfp4.dequantize(blocks.to(CUDA), scales.to(CUDA), dtype)
    assert torch.equal(ours.cpu(), mxfp4.dequantize_reference(blocks, scales, dtype))


def test_grouped_products_are_those_of_one_expert_after_the_other() -> None:
    generator = torch.Generator(CUDA).manual_seed(3)
    index = torch.randint(0, 12, (777, 4), device=CUDA, generator=generator)
    index[index == 5] = 6  # an expert without tokens
    pairs = Pairs(index, 16)
    rows = torch.randn(777 * 4, 64, device=CUDA, dtype=torch.bfloat16, generator=generator)
    wide = torch.randn(777 * 4, 24, device=CUDA, dtype=torch.bfloat16, generator=generator)
    matrices = torch.randn(16, 64, 24, device=CUDA, dtype=torch.bfloat16, generator=generator)
    assert has_kernel(rows, 64, 24)
    ours, outer = products(rows, matrices, pairs), outer_products(rows, wide, pairs)
    for group, start, end in pairs.occupied:
        alone = rows[start:end].float() @ matrices[group].float()
        torch.testing.assert_close(ours[start:end].float(), alone, rtol=2e-2, atol=2e-2)
        both = rows[start:end].float().t() @ wide[start:end].float()
        torch.testing.assert_close(outer[group], both, rtol=2e-2, atol=0.3)
    empty = [group for group in range(16) if group not in {span.group for span in pairs.occupied}]
    assert empty
    assert not outer[empty].any()


def test_a_layer_of_experts_learns_the_same_twice() -> None:
    """Sums are in a fixed order: losses of a repeated run do not drift."""
    generator = torch.Generator(CUDA).manual_seed(4)
    index = torch.randint(0, 8, (512, 2), device=CUDA, generator=generator)
    rows = torch.randn(1024, 128, device=CUDA, dtype=torch.bfloat16, generator=generator)
    first, second = (Pairs(index, 8).summed(rows) for _ in range(2))
    assert torch.equal(first, second)
