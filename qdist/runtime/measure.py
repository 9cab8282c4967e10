"""How much memory this rank has taken, and how much it has read."""

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qdist.runtime.engine import Engine, bytes_of


class Peak(NamedTuple):
    """Peak bytes of a rank. On the CPU all of it is `context`: there is no telling tensors from the rest."""

    allocated: int
    """Of torch's tensors on the GPU."""
    context: int
    """CUDA context, libraries and communication buffers on the GPU; on the CPU, the largest resident set."""
    reserved: int = 0
    """Of torch's allocator on the GPU: the tensors, and what fragmentation and caching add."""
    load: int = 0
    """Tensors and context together, while the backbone was loaded; not in the others."""

    @property
    def total(self) -> int:
        return self.allocated + self.context


def peak(device: torch.device, *, load: int = 0) -> Peak:
    """The peak since the start or `load_peak`. Where another process uses the same GPU, its memory counts as context.

    load: what `load_peak` gave.
    """
    if device.type == "cpu":
        return Peak(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 0, load)
    free, total = torch.cuda.mem_get_info(device)
    context = max(0, total - free - torch.cuda.memory_reserved(device))
    return Peak(torch.cuda.max_memory_allocated(device), context, torch.cuda.max_memory_reserved(device), load)


def memory_now(devices: Sequence[torch.device], context_bytes: int) -> int:
    """What this rank holds at the moment; on GPUs, tensors and `context_bytes` beside them. Safe in any thread."""
    if devices[0].type == "cpu":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return sum(map(torch.cuda.memory_allocated, devices)) + context_bytes


class Parts(NamedTuple):
    """Bytes of a rank's tensors that stay from step to step, on all of its devices together."""

    weights: int
    """The frozen backbone as this rank holds it."""
    adapter: int
    gradients: int
    optimizer: int


def parts(model: nn.Module, engine: Engine) -> Parts:
    """What a rank holds after its last step; a shard counts with its own part."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return Parts(
        bytes_of(map(_local, (*frozen, *model.buffers()))),
        bytes_of(parameter for parameter in model.parameters() if parameter.requires_grad),
        *engine.held(),
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_peak(device: torch.device) -> int:
    """The peak so far, to be called once the backbone is loaded; from then on `peak` counts anew.

    What the allocator kept of loading is given back, or it would show as reserved by the training.
    """
    reached = peak(device).total
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return reached


def disk_read_bytes() -> int:
    """Bytes that this process has had from disks so far (Linux); a page that was in memory already costs nothing."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)
