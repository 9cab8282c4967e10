"""Ranks of a split backbone as a grid: the stages of a group, and the ranks that hold the same stage."""

import datetime
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from qdist.core.errors import RunError
from qdist.core.plan import Plan


class Grid(NamedTuple):
    """Where this rank is. Ranks are numbered group by group, and stage by stage within one."""

    group: int
    position: int
    groups: int
    stages: int
    mates: Any
    """Process group: the stages of this group."""
    peers: Any
    """Process group: the ranks with this stage, one in each group."""

    @property
    def first(self) -> bool:
        """This stage embeds tokens."""
        return self.position == 0

    @property
    def last(self) -> bool:
        """This stage computes the loss."""
        return self.position == self.stages - 1

    def over_stages(self, value: torch.Tensor) -> torch.Tensor:
        """A scalar summed over the stages of this group."""
        total = value.clone()
        dist.all_reduce(total, group=self.mates)
        return total

    # What DeepSpeed asks of an `mpu`. Stages are its model parallelism: it sums norms and overflows over them.

    def get_model_parallel_rank(self) -> int:
        return self.position

    def get_model_parallel_world_size(self) -> int:
        return self.stages

    def get_model_parallel_group(self) -> Any:
        return self.mates

    def get_data_parallel_rank(self) -> int:
        return self.group

    def get_data_parallel_world_size(self) -> int:
        return self.groups

    def get_data_parallel_group(self) -> Any:
        return self.peers

    def get_data_parallel_group_ranks(self) -> list[int]:
        return [group * self.stages + self.position for group in range(self.groups)]


def make_grid(plan: Plan, *, timeout: datetime.timedelta) -> Grid:
    """Make the process groups of a split plan. Collective over all ranks of the run.

    Raises RunError when the ranks are not those of the plan.
    """
    groups, stages = plan.groups, plan.gpus_per_group
    if not dist.is_initialized() or dist.get_world_size() != groups * stages:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        raise RunError(f"{groups} group(s) of {stages} stages, and {ranks} rank(s)", try_="--resume")
    rank = dist.get_rank()
    mates = peers = None
    if groups == 1:  # all ranks of the run, whose communicator there is already: a second one takes 0.5 GiB
        mates = dist.group.WORLD
    # Every rank makes every process group, in the same order.
    for group in range(groups if groups > 1 else 0):
        made = dist.new_group([group * stages + position for position in range(stages)], timeout=timeout)
        mates = made if group == rank // stages else mates
    for position in range(stages):
        made = dist.new_group([group * stages + position for group in range(groups)], timeout=timeout)
        peers = made if position == rank % stages else peers
    grid = Grid(rank // stages, rank % stages, groups, stages, mates, peers)
    # NCCL wants all ranks in a group's first exchange, and the first one of a pipeline is between two.
    dist.barrier(group=mates)
    return grid
