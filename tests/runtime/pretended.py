"""The ranks of a sharded backbone without processes: each knows its own part, and one gathers where it is alone."""

from collections.abc import Sequence

import torch

from qdist.runtime.model.sliced import Peers, Unit

CPU = torch.device("cpu")


class Pretended(Peers):
    """A rank that notes which part it was to gather."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.group, self.rank, self.count = None, rank, count
        self.gathered: list[torch.Tensor] = []

    def gather(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        self.gathered.append(part)
        whole.copy_(part)

    def add_up(self, values: torch.Tensor) -> None:
        pass


def join(units: Sequence[Unit]) -> torch.Tensor:
    """The buffer that ranks gather the same unit into."""
    return torch.cat([unit.part for unit in units])
