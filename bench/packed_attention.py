"""Attention over packed rows: flash attention by boundaries beside a mask of the row, and rows of padded samples.

    python bench/packed_attention.py

Without a GPU, at a tiny size and with the CPU's own way. Prints for each shape the largest difference of outputs and
gradients from float32 under a mask, relative to the largest number; milliseconds of both passes by boundaries, under a
mask, and of the same samples each padded to the longest; and whether a CUDA graph of the passes gave the same numbers.
"""

import random
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from qdist.runtime.model.apart import attend, block_mask


class Shape(NamedTuple):
    """Heads, their widths, and a window."""

    heads: int
    kv_heads: int
    head: int
    of_values: int
    window: int = 0


SHAPES = (
    Shape(32, 32, 128, 128), Shape(32, 8, 128, 128), Shape(9, 3, 64, 64), Shape(8, 4, 256, 256, 512),
    Shape(32, 8, 80, 80, 256), Shape(16, 16, 192, 128),
)  # fmt: skip


def main() -> None:
    """Every shape, one line each."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    longest, rows = (2048, 4) if on_gpu else (32, 2)
    drawn = random.Random(0)
    lengths: list[int] = []
    while sum(lengths) < longest * rows:
        length = int(drawn.lognormvariate(5.5 if on_gpu else 2, 0.9)) + 5
        lengths.append(min(longest, length, longest * rows - sum(lengths)))
    print(f"torch {torch.__version__}, {device.type}: {len(lengths)} samples in {longest * rows} positions")
    print("heads kv head value window  output     grads      apart   masked  padded  graph")
    for shape in SHAPES if on_gpu else SHAPES[1:3]:
        print(line_of(shape, lengths, longest, device), flush=True)


def line_of(shape: Shape, lengths: list[int], longest: int, device: torch.device) -> str:
    """One row of the table."""
    width = sum(lengths)
    ends = torch.tensor([0, *lengths, *[0] * 16], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = [
        torch.randn(1, heads, width, size, device=device, dtype=dtype, requires_grad=True)
        for heads, size in (
            (shape.heads, shape.head), (shape.kv_heads, shape.head), (shape.kv_heads, shape.of_values),
        )
    ]  # fmt: skip
    module = torch.nn.Module()
    mask = block_mask(ends, width, shape.window if shape.window < longest else 0)

    def apart(*given: torch.Tensor) -> torch.Tensor:
        window = shape.window or None
        return attend(module, *given, None, sliding_window=window, cu_seq_lens_q=ends, max_length_q=longest)[0]

    def masked(*given: torch.Tensor) -> torch.Tensor:
        gqa = shape.heads != shape.kv_heads
        return functional.scaled_dot_product_attention(*given, attn_mask=mask, enable_gqa=gqa).transpose(1, 2)

    def padded(*given: torch.Tensor) -> torch.Tensor:
        gqa = shape.heads != shape.kv_heads
        return functional.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=gqa)

    tall = [
        torch.randn(len(lengths), each.shape[1], longest, each.shape[3], device=device, dtype=dtype, requires_grad=True)
        for each in inputs
    ]
    out, gradients = both(apart, inputs)
    exact, wanted = both(masked, [each.detach().float().requires_grad_() for each in inputs])
    differences = [relative(one, other) for one, other in zip(gradients, wanted, strict=True)]
    same = captured(apart, inputs, out, gradients) if device.type == "cuda" else "-"
    calls = ((apart, inputs), (masked, inputs), (padded, tall))
    times = [milliseconds(lambda call=call, given=given: both(call, given), device) for call, given in calls]
    return (
        f"{shape.heads:5} {shape.kv_heads:2} {shape.head:4} {shape.of_values:5} {shape.window:6}  "
        f"{relative(out, exact):.2e}   {max(differences):.2e} {times[0]:7.3f} {times[1]:8.3f} {times[2]:7.3f}  {same}"
    )


def both(
    call: Callable[..., torch.Tensor], inputs: list[torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Output, and gradients of its sum of squares."""
    out = call(*inputs)
    return out, torch.autograd.grad(out.float().square().sum(), inputs)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float((one.float() - other.float()).abs().max().detach() / other.float().abs().max().detach())


def captured(call: Callable[..., torch.Tensor], inputs: list[torch.Tensor], *wanted: object) -> str:
    """Whether a graph of both passes gives the same numbers."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out, gradients = both(call, inputs)
    graph.replay()
    torch.cuda.synchronize()
    first, others = wanted
    pairs = [(out, first), *zip(gradients, others, strict=True)]
    return "equal" if all(torch.equal(one, other) for one, other in pairs) else "differs"


def milliseconds(call: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """The median of a few calls."""
    found = []
    for _ in range(times + 2):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(1e3 * (time.perf_counter() - began))
    return sorted(found[2:])[times // 2]


if __name__ == "__main__":
    main()
