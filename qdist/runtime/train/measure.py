"""A rank's peak memory, its bytes read from disk, and how a step's time is spent."""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from qdist.runtime.engine.torch import Engine, bytes_of
from qdist.runtime.model.sliced import kept_bytes


class Peak(NamedTuple):
    """Peak bytes of a rank. On the CPU all of it counts as `context`: tensors cannot be told from the rest."""

    allocated: int
    """Bytes of torch's tensors on the GPU."""
    context: int
    """Bytes of CUDA context, libraries and communication buffers on the GPU; on the CPU, the largest resident set."""
    reserved: int = 0
    """Bytes reserved by torch's allocator on the GPU: tensors plus fragmentation and caching."""
    load: int = 0
    """Bytes of tensors and context together while the backbone was loading; not in the other fields."""

    @property
    def total(self) -> int:
        return self.allocated + self.context


def peak(device: torch.device, *, load: int = 0) -> Peak:
    """The peak since the start or `load_peak`. Memory of other processes on the same GPU counts as context.

    load: what `load_peak` gave.
    """
    if device.type == "cpu":
        return Peak(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 0, load)
    free, total = torch.cuda.mem_get_info(device)
    context = max(0, total - free - torch.cuda.memory_reserved(device))
    return Peak(torch.cuda.max_memory_allocated(device), context, torch.cuda.max_memory_reserved(device), load)


def memory_now(devices: Sequence[torch.device], context_bytes: int) -> int:
    """Bytes that this rank holds now; on GPUs, tensors plus `context_bytes`. Safe in any thread."""
    if devices[0].type == "cpu":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return sum(map(torch.cuda.memory_allocated, devices)) + context_bytes


class HeldMemory(NamedTuple):
    """Bytes of a rank's tensors that persist between steps, over all of its devices."""

    weights: int
    """Bytes of the frozen backbone on this rank."""
    adapter: int
    gradients: int
    optimizer: int


def parts(model: nn.Module, engine: Engine) -> HeldMemory:
    """What a rank holds after its last step; of a shard, only its own part."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return HeldMemory(
        bytes_of(map(kept_bytes, (*frozen, *model.buffers()))),
        bytes_of(parameter for parameter in model.parameters() if parameter.requires_grad),
        *engine.held(),
    )


def load_peak(device: torch.device) -> int:
    """The peak so far; call once the backbone is loaded. `peak` then counts anew.

    What the allocator kept of loading is given back, or it would show as reserved by the training.
    """
    reached = peak(device).total
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return reached


def disk_read_bytes() -> int:
    """Bytes this process has read from disks so far (Linux); pages already in memory do not count."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


class Stopwatch:
    """Marks points within a step, for timing. Runs from its creation."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began = time.perf_counter()
        self._marks: dict[str, Any] = {}
        self.data_s = 0.0
        """Seconds spent in `data`, on the CPU."""
        self.mark("began")

    def mark(self, name: str) -> None:
        """Mark this point in the step; on a GPU, when it gets here."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    @contextmanager
    def data(self) -> Iterator[None]:
        """Time the creation of samples."""
        began = time.perf_counter()
        yield
        self.data_s += time.perf_counter() - began

    def between(self, first: str, last: str) -> float:
        """Seconds between two marks. A GPU must have reached the second."""
        if self._cuda:
            milliseconds: float = self._marks[first].elapsed_time(self._marks[last])
            return milliseconds / 1e3
        seconds: float = self._marks[last] - self._marks[first]
        return seconds

    def total(self) -> float:
        """Seconds so far, on the CPU's clock."""
        return time.perf_counter() - self._began
