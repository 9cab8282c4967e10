"""Dropout's kernels on a real GPU: the masks of the reference to the bit, and its products."""

import pytest
import torch

from qdist.runtime.kernels import dropout
from qdist.runtime.kernels.dropout import Mask

SHAPES = [(70, 200, 8), (513, 4096, 64), (3, 72, 300), (8192, 4096, 192)]


def masks(share: float) -> tuple[Mask, Mask]:
    """One mask on the CPU and on the GPU."""
    seed = torch.tensor([(1 << 62) + 12345678912345])
    return Mask(seed, 2**31 - 5, share), Mask(seed.cuda(), 2**31 - 5, share)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize(("tokens", "width", "rank"), SHAPES)
def test_a_gpu_draws_the_masks_that_a_cpu_does(tokens: int, width: int, rank: int, share: float) -> None:
    here, there = masks(share)
    keep = dropout.kept(here, tokens, width)
    assert torch.equal(dropout.kept(there, tokens, width).cpu(), keep)
    assert torch.equal(dropout.dropped(torch.ones(tokens, width, device="cuda"), there).cpu().bool(), keep)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width", "rank"), SHAPES)
def test_the_products_are_near_those_of_float64(tokens: int, width: int, rank: int, dtype: torch.dtype) -> None:
    _, mask = masks(0.1)
    torch.manual_seed(0)
    shapes = ((tokens, width), (rank, width), (tokens, rank), (tokens, width))
    inputs, down, narrow, total = (torch.randn(*shape, device="cuda").to(dtype) for shape in shapes)
    exact = inputs.double() * dropout.kept(mask, tokens, width)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    near(dropout.dropped_product(inputs, down, mask), exact @ down.double().t(), bound)
    near(dropout.dropped_gradient(narrow, inputs, mask), narrow.double().t() @ exact, bound)
    added = (narrow.double() @ down.double()) * dropout.kept(mask, tokens, width)
    wanted = total.double() + 0.5 * added
    dropout.add_dropped(total, narrow, down, mask, 0.5)
    near(total, wanted, bound)


def near(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    assert float((found.double() - wanted).norm() / wanted.norm()) < bound
