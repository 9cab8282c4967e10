"""Which module implements which placement."""

import torch

from qdist.core.planning.plan import Plan
from qdist.runtime.placements.base import Placement
from qdist.runtime.placements.replicate import Replicate
from qdist.runtime.placements.shard import Shard
from qdist.runtime.placements.split.ranks import split

PLACEMENTS = {"replicate": Replicate, "shard": Shard, "split": split}


def placement_of(plan: Plan, rank: int, devices: tuple[torch.device, ...]) -> Placement:
    """A rank of the plan's placement. devices: the rank's, in plan order."""
    made: Placement = PLACEMENTS[plan.placement](plan, rank, devices)
    return made
