"""Benchmarks one card and its links, one process per card.

Each rank writes OUT/rank0.json, a `CardRates`: once before it talks to the others, so that broken links lose nothing
else, and once more at the end.
"""

import datetime
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec
import torch
import torch.distributed as dist

from qdist.core.errors import MachineError
from qdist.core.machine.measured import CardRates, LinkRates
from qdist.core.requests import MeasureRates
from qdist.core.text import MIB
from qdist.host.files import write_atomic
from qdist.runtime.kernel_rates import measure_kernels

_TIMEOUT = datetime.timedelta(seconds=100)
"""Time for ranks to wait for each other to import torch, which a cold network disk makes slow."""
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Renamed in torch 2.13."""


class Sizes(NamedTuple):
    """How much work each measurement does."""

    matrix: int
    copy_bytes: int
    link_bytes: int
    """Bytes of each rank's part."""
    warm_s: float
    """Seconds of matrix products before the timed ones: cards lower their clock once they draw full power."""


FULL = Sizes(8192, 512 * MIB, 256 * MIB, 0.7)
TINY = Sizes(64, MIB, MIB, 0.0)


def measure(out: Path, *, rank: int, ranks: int, device: torch.device, sizes: Sizes) -> None:
    """Benchmark as one of `ranks` processes that all call this."""
    path = out / f"rank{rank}.json"
    alone = _card(rank, device, sizes)
    write_atomic(path, msgspec.json.encode(alone))
    if ranks > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=f"file://{out}/rendezvous", rank=rank, world_size=ranks, timeout=_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
        dist.barrier()
    host = _host_rate(device, sizes)
    links = _links(rank, ranks, device, sizes) if ranks > 1 else None
    write_atomic(path, msgspec.json.encode(msgspec.structs.replace(alone, host_bytes_s=host, links=links)))
    if ranks > 1:
        dist.destroy_process_group()


def _card(rank: int, device: torch.device, sizes: Sizes) -> CardRates:
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    error, differs = _round_trip(device)
    return CardRates(
        rank=rank,
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        dtype=str(dtype).removeprefix("torch."),
        matmul_flops_s=_matmul_rate(device, dtype, sizes),
        memory_bytes_s=_memory_rate(device, sizes),
        linear_s=_linear_seconds(device, dtype),
        round_trip_error=error,
        round_trip_differs=differs,
        kernels=measure_kernels(device, dtype) if device.type == "cuda" else None,
    )


def _seconds(device: torch.device, work: Callable[[], object], *, warm_s: float = 0.0) -> float:
    """Median seconds per call over batches of calls, after warm-up. Without `warm_s`, all ranks make as many calls."""
    calls, batches = 5, 7
    for _ in range(calls):
        work()
    _wait(device)
    warm = time.perf_counter() + warm_s
    while time.perf_counter() < warm:
        work()
        _wait(device)
    return median(_batch_seconds(device, work, calls) for _ in range(batches)) / calls


def _batch_seconds(device: torch.device, work: Callable[[], object], calls: int) -> float:
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(calls):
            work()
        return time.perf_counter() - began
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmul_rate(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> float:
    """Matrix product rate on random data: zeros switch no transistors and run faster than any real work."""
    n = sizes.matrix
    one, other = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(one)
    return 2 * n**3 / _seconds(device, lambda: torch.mm(one, other, out=product), warm_s=sizes.warm_s)


def _memory_rate(device: torch.device, sizes: Sizes) -> float:
    source = pattern(sizes.copy_bytes, seed=1, device=device)
    target = torch.empty_like(source)
    return 2 * sizes.copy_bytes / _seconds(device, lambda: target.copy_(source))


def _linear_seconds(device: torch.device, dtype: torch.dtype, count: int = 20) -> float:
    """Seconds for Python and the driver to launch an adapted NF4 linear too small to keep any card busy."""
    from qdist.core.spec.sections import Quant
    from qdist.runtime.adapters.lora import adapted_product
    from qdist.runtime.model.packed import Packed4bit
    from qdist.runtime.model.skeleton import fill
    from qdist.runtime.model.weights import RandomWeights

    width, tokens = 128, 32
    layer = Packed4bit(width, width, bias=False, dtype=dtype, quant=Quant())
    fill(torch.nn.ModuleList([layer]), RandomWeights(device, dtype), device=device)
    down, up = (torch.zeros(shape, device=device, requires_grad=True) for shape in ((8, width), (width, 8)))
    inputs = torch.zeros(tokens, width, device=device, dtype=dtype, requires_grad=True)

    def there_and_back() -> None:
        hidden = inputs
        for _ in range(count):
            hidden = adapted_product(hidden, down, up, layer, 1.0)
        hidden.sum().backward()

    times = []
    for _ in range(7):
        _wait(device)
        began = time.perf_counter()
        there_and_back()
        _wait(device)
        times.append(time.perf_counter() - began)
    return median(times) / count


def _host_rate(device: torch.device, sizes: Sizes) -> float:
    """Host copy rate with all cards at once: they share host memory and often a PCIe switch, as when offloading."""
    source = torch.empty(sizes.link_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    return sizes.link_bytes / _seconds(device, lambda: target.copy_(source, non_blocking=True))


def _round_trip(device: torch.device) -> tuple[float, float]:
    """Normal numbers to NF4 and back: the error on the card, and how its unpacking differs from the CPU's."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    block, settings = 64, {"blocksize": 64, "quant_type": "nf4"}
    values = torch.randn(4096 * block, generator=torch.Generator().manual_seed(0))
    largest = values.view(-1, block).abs().amax(1, keepdim=True)

    def off(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(((one - other).view(-1, block).abs() / largest).max())

    packed, state = quantize_4bit(values.to(device), **settings)
    there = dequantize_4bit(packed, state).cpu()
    packed, state = quantize_4bit(values, **settings)
    here = dequantize_4bit(packed, state)
    state.to(device)
    return off(there, values), off(dequantize_4bit(packed.to(device), state).cpu(), here)


def _links(rank: int, ranks: int, device: torch.device, sizes: Sizes) -> LinkRates:
    part = sizes.link_bytes
    mine = pattern(part, seed=rank, device=device)
    gather_s, wrong = _gathered(mine, ranks)
    reduce_s, wrong_sums = _reduced(part // 4, rank, ranks, device)
    peer_rate, wrong_peers = _peers(mine, rank, ranks) if device.type == "cuda" else (None, ())
    return LinkRates(
        gather_bytes_s=(ranks - 1) * part / gather_s,
        reduce_bytes_s=2 * (ranks - 1) / ranks * part / reduce_s,
        peer_bytes_s=peer_rate,
        checked_bytes=ranks * part,
        wrong_gathered_bytes=wrong,
        wrong_reduced_values=wrong_sums,
        wrong_peer_bytes=wrong_peers,
    )


def _gathered(mine: torch.Tensor, ranks: int) -> tuple[float, int]:
    """Seconds of an all-gather, and the number of bytes that arrived corrupted."""
    part = mine.numel()
    everyone = torch.empty(ranks * part, dtype=torch.uint8, device=mine.device)
    _gather(everyone, mine)
    arrived = enumerate(everyone.split(part))
    wrong = sum(_wrong(piece, pattern(part, seed=sender, device=mine.device)) for sender, piece in arrived)
    return _seconds(mine.device, lambda: _gather(everyone, mine)), wrong


def _reduced(count: int, rank: int, ranks: int, device: torch.device) -> tuple[float, int]:
    """Seconds of an all-reduce of `count` floats, and the number of wrong sums."""
    summed = torch.full((count,), rank + 1.0, device=device)
    dist.all_reduce(summed)
    wrong = int((summed != ranks * (ranks + 1) / 2).sum())
    summed.zero_()  # or the sums of sums below grow until they are infinite
    return _seconds(device, lambda: dist.all_reduce(summed)), wrong


def _peers(mine: torch.Tensor, rank: int, ranks: int) -> tuple[float, tuple[tuple[int, int], ...]]:
    """Copy to every other card, all ranks at once to different ones: the slowest rate, and where bytes changed."""
    rates, wrong = [], []
    for distance in range(1, ranks):
        peer = torch.device("cuda", (rank + distance) % ranks)
        torch.cuda.empty_cache()
        arrived = torch.empty_like(mine, device=peer)
        dist.barrier()
        rates.append(mine.numel() / _seconds(mine.device, partial(arrived.copy_, mine, non_blocking=True)))
        _wait(mine.device)
        changed = _wrong(arrived, pattern(mine.numel(), seed=rank, device=peer))
        if changed:
            wrong.append((int(peer.index), changed))
        del arrived
    return min(rates), tuple(wrong)


def pattern(count: int, *, seed: int, device: torch.device) -> torch.Tensor:
    """`count` pseudorandom bytes that include every 16-bit NaN, the same on any device: a hash of the position."""
    words = torch.arange(math.ceil(count / 4), dtype=torch.int32, device=device)
    words += seed * 0x01000193
    for shift, factor in ((15, -1640531527), (12, 0x2C1B3C6D), (15, 0x297A2D39)):
        words ^= (words >> shift) & ((1 << (32 - shift)) - 1)  # torch's shift copies the sign
        words *= factor
    words ^= (words >> 16) & 0xFFFF
    return words.view(torch.uint8)[:count]


def _wrong(arrived: torch.Tensor, sent: torch.Tensor) -> int:
    return int((arrived != sent).sum())


def run(request: MeasureRates) -> None:
    """Benchmark as one of the ranks. Raises MachineError if torch finds fewer GPUs than ranks."""
    if request.device == "cpu":
        torch.set_num_threads(1)
        device, sizes = torch.device("cpu"), TINY
    else:
        if torch.cuda.device_count() < request.ranks:
            raise MachineError(
                f"torch {torch.__version__} finds {torch.cuda.device_count()} GPUs of {request.ranks}",
                try_="qdist doctor",
            )
        device, sizes = torch.device("cuda", request.rank), FULL
        torch.cuda.set_device(device)
    measure(Path(request.out).resolve(), rank=request.rank, ranks=request.ranks, device=device, sizes=sizes)
