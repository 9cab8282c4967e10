"""How much memory this rank has taken."""

import resource
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """Peak bytes of a rank. On the CPU all of it is `context`: there is no telling tensors from the rest."""

    allocated: int
    """Of torch's tensors on the GPU."""
    context: int
    """CUDA context, libraries and communication buffers on the GPU; on the CPU, the largest resident set."""

    @property
    def total(self) -> int:
        return self.allocated + self.context


def peak(device: torch.device) -> Peak:
    """The peak so far. Where another process uses the same GPU, its memory counts as context."""
    if device.type == "cpu":
        return Peak(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    free, total = torch.cuda.mem_get_info(device)
    context = max(0, total - free - torch.cuda.memory_reserved(device))
    return Peak(torch.cuda.max_memory_allocated(device), context)
