"""What ranks tell each other outside the engine: sums, agreement, barriers. One rank needs none of it."""

from typing import Any

import torch
import torch.distributed as dist


class Comm:
    """The ranks of a run. Reductions are in float64, so that the order of the ranks hardly matters."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Each value summed over all ranks; one reduction and one device synchronization for all of them."""
        parts = [torch.as_tensor(value, dtype=torch.float64, device=self.device).reshape(()) for value in values]
        packed = torch.stack(parts)
        if self.world_size > 1:
            dist.all_reduce(packed)
        summed: list[float] = packed.tolist()
        return summed

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()
