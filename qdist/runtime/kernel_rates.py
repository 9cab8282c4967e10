"""Benchmarks the kernels of a training step on one GPU, one after the other, for the planner."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from qdist.core.machine.kernel_rates import GROUPED_SHARE, AttentionRate, KernelRates, fit_products

_TOKENS, _WIDTHS = (512, 2048, 8192), ((1024, 4096), (4096, 4096), (4096, 11008))
_FP8_FROM = (8, 9)
"""Compute capability of the first cards that multiply in fp8."""
_RANK, _WIDTH, _OUTPUTS, _ROWS = 64, 4096, 11008, 8192
_EXPERTS, _PAIRS, _EXPERT_WIDTHS = 64, 16384, (2048, 1536)
_ATTENTION = ((64, 512), (128, 512), (128, 2048), (256, 512))
"""(head size, length) of rows to attend to; 8,192 tokens of a width of 4,096 each."""
_TINY_KERNELS = 400
_PAUSE_S = 0.05
"""Pause before each measurement: at the full clock a card soon draws all its power, and then lowers it."""


def measure_kernels(device: torch.device, dtype: torch.dtype) -> KernelRates:
    """Rates of kernels on a GPU, at its full clock. dtype: of the products."""
    products = [_product(device, dtype, tokens, *widths) for tokens in _TOKENS for widths in _WIDTHS]
    dense, product_s = fit_products(products)
    kernel_s, graph_s = _graph_seconds(device)
    return KernelRates(
        dense_flops_s=dense,
        product_s=product_s,
        grouped_flops_s=_grouped_rate(device, dtype) or GROUPED_SHARE * dense,
        fp8_flops_s=_fp8_rate(device),
        attention=tuple(_attention(device, dtype, head_dim, length) for head_dim, length in _ATTENTION),
        unpack_bytes_s=_unpack_rate(device, dtype),
        traffic_bytes_s=_traffic_rate(device, dtype),
        thin_bytes_s=_thin_rate(device, dtype, kernel_s),
        added_bytes_s=_added_rate(device, dtype, kernel_s),
        kernel_s=kernel_s,
        graph_s=graph_s,
    )


def _seconds(device: torch.device, work: Callable[[], object], *, calls: int = 10, batches: int = 5) -> float:
    """Median seconds of the GPU per call, after a pause. Calls are captured, so that none waits for Python."""
    for _ in range(3):
        work()
    graph = _captured(device, work, calls)
    times = []
    for _ in range(batches):
        time.sleep(_PAUSE_S)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1000 / calls)
    return median(times)


def _captured(device: torch.device, work: Callable[[], object], calls: int) -> Any:
    """A CUDA graph of so many calls."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    return graph


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _product(device: torch.device, dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> tuple[float, float]:
    """(FLOP, seconds) of a dense product."""
    left, right = _random(device, dtype, tokens, inputs), _random(device, dtype, outputs, inputs)
    product = torch.empty((tokens, outputs), device=device, dtype=dtype)
    work = partial(torch.mm, left, right.t(), out=product)
    return 2.0 * tokens * inputs * outputs, _seconds(device, work)


def _fp8_rate(device: torch.device) -> float:
    """FLOP/s of an fp8 product with a scale a row; 0 on cards that have none."""
    if torch.cuda.get_device_capability(device) < _FP8_FROM:
        return 0.0
    rows, inputs, outputs = _ROWS, _WIDTH, _OUTPUTS
    left, right = (_random(device, torch.bfloat16, count, inputs).to(torch.float8_e4m3fn) for count in (rows, outputs))
    scales = torch.ones((rows, 1), device=device), torch.ones((1, outputs), device=device)
    seconds = _seconds(
        device,
        lambda: torch._scaled_mm(
            left, right.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16, use_fast_accum=True
        ),
    )
    return 2 * rows * inputs * outputs / seconds


def _grouped_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of products of rows with the matrix of their expert; None where torch has no kernel for them."""
    if not hasattr(functional, "grouped_mm") or dtype != torch.bfloat16:
        return None
    inputs, outputs = _EXPERT_WIDTHS
    rows, matrices = _random(device, dtype, _PAIRS, inputs), _random(device, dtype, _EXPERTS, inputs, outputs)
    sizes = torch.full((_EXPERTS,), _PAIRS // _EXPERTS, device=device)
    ends = sizes.cumsum(0).to(torch.int32)
    seconds = _seconds(device, lambda: functional.grouped_mm(rows, matrices, offs=ends))
    return 2 * _PAIRS * inputs * outputs / seconds


def _attention(device: torch.device, dtype: torch.dtype, head_dim: int, length: int) -> AttentionRate:
    """Causal attention by the kernel that torch chooses."""
    shape = (_ROWS // length, _WIDTH // head_dim, length, head_dim)
    query, key, value, gradient = (_random(device, dtype, *shape) for _ in range(4))
    for each in (query, key, value):
        each.requires_grad_()

    def forward() -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    with torch.no_grad():
        there = _seconds(device, forward)
    both = _seconds(device, lambda: torch.autograd.grad(forward(), (query, key, value), gradient))
    flops = 2.0 * _ROWS * length * _WIDTH
    return AttentionRate(
        head_dim=head_dim, length=length, forward_flops_s=flops / there,
        backward_flops_s=2.5 * flops / max(both - there, 0.2 * both),
    )  # fmt: skip


def _unpack_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s of unpacking an NF4 matrix, as training does."""
    from qdist.core.spec.sections import Quant
    from qdist.runtime.model.packed import Packed4bit
    from qdist.runtime.model.skeleton import fill
    from qdist.runtime.model.weights import RandomWeights

    layer = Packed4bit(_WIDTH, _OUTPUTS, bias=False, dtype=dtype, quant=Quant())
    fill(torch.nn.ModuleList([layer]), RandomWeights(device, dtype), device=device)
    packed = layer.weight.numel() + layer.absmax.numel() * layer.absmax.element_size()
    return (packed + dtype.itemsize * _WIDTH * _OUTPUTS) / _seconds(device, lambda: layer.matrix(dtype, device))


def _traffic_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s of an addition: two tensors read, one written."""
    one, other, out = (_random(device, dtype, _ROWS, _WIDTH) for _ in range(3))
    seconds = _seconds(device, partial(torch.add, one, other, out=out))
    return 3 * one.numel() * dtype.itemsize / seconds


def _thin_rate(device: torch.device, dtype: torch.dtype, kernel_s: float) -> float:
    """Bytes/s at which a product with A reads its inputs."""
    wide, down = _random(device, dtype, _ROWS, _WIDTH), _random(device, dtype, _RANK, _WIDTH)
    seconds = _seconds(device, lambda: wide @ down.t())
    return wide.numel() * dtype.itemsize / max(seconds - 1.5 * kernel_s, 0.5 * seconds)


def _added_rate(device: torch.device, dtype: torch.dtype, kernel_s: float) -> float:
    """Bytes/s at which a product with B is added to a wide result."""
    narrow, up = _random(device, dtype, _ROWS, _RANK), _random(device, dtype, _WIDTH, _RANK)
    wide = torch.zeros((_ROWS, _WIDTH), device=device, dtype=dtype)
    seconds = _seconds(device, lambda: wide.addmm_(narrow, up.t()))
    return 2 * wide.numel() * dtype.itemsize / max(seconds - kernel_s, 0.5 * seconds)


def _graph_seconds(device: torch.device) -> tuple[float, float]:
    """(seconds from one tiny kernel of a graph to the next, seconds to launch a graph)."""
    tiny = torch.zeros(1, device=device)
    many = _seconds(device, lambda: tiny.add_(1), calls=_TINY_KERNELS)
    graph = _captured(device, lambda: tiny.add_(1), 1)
    launches = []
    for _ in range(20):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize(device)
        launches.append(time.perf_counter() - began)
    return many, max(0.0, median(launches) - many)
