"""Which rank is where: groups of GPUs over the nodes of a run, and their arithmetic in one place.

A run has one node today. Rank, local rank and node are types of their own, so that mypy tells one from another.
"""

from typing import NamedTuple, NewType

from qdist.core.errors import PlanError
from qdist.core.text import counted

Rank = NewType("Rank", int)
"""Number of a process in the run, group by group and stage by stage within one."""
LocalRank = NewType("LocalRank", int)
"""Number of a process on its node."""
Node = NewType("Node", int)
"""Number of a machine in the run."""


class World(NamedTuple):
    """`groups` of `gpus_per_group` GPUs, `gpus_per_rank` of them to a rank, on `nodes` machines of as many GPUs."""

    groups: int
    gpus_per_group: int
    gpus_per_rank: int = 1
    nodes: int = 1

    @property
    def size(self) -> int:
        """Processes of the run."""
        return self.groups * self.gpus_per_group // self.gpus_per_rank

    @property
    def ranks_per_node(self) -> int:
        return self.size // self.nodes

    @property
    def ranks(self) -> tuple[Rank, ...]:
        return tuple(map(Rank, range(self.size)))

    def node_of(self, rank: Rank) -> Node:
        return Node(rank // self.ranks_per_node)

    def local_rank_of(self, rank: Rank) -> LocalRank:
        return LocalRank(rank % self.ranks_per_node)

    def rank_of(self, node: Node, local_rank: LocalRank) -> Rank:
        return Rank(node * self.ranks_per_node + local_rank)

    def group_of(self, rank: Rank) -> int:
        return rank * self.gpus_per_rank // self.gpus_per_group

    def position_of(self, rank: Rank) -> int:
        """Place within the group: the shard of a sharded backbone, the first stage of a split one."""
        return rank * self.gpus_per_rank % self.gpus_per_group

    def gpus_of(self, rank: Rank) -> tuple[int, ...]:
        """The rank's GPUs, as its node numbers them."""
        first = self.local_rank_of(rank) * self.gpus_per_rank
        return tuple(range(first, first + self.gpus_per_rank))


def world_of(groups: int, gpus_per_group: int, *, size: int, nodes: int = 1) -> World:
    """The world of `size` ranks that share out the GPUs of all groups."""
    return World(groups, gpus_per_group, groups * gpus_per_group // size, nodes)


def checked_world(world: World) -> World:
    """The world, if groups, ranks and nodes go into each other.

    Raises PlanError where ranks share a GPU group that their number of GPUs does not divide, or a group would span
    nodes: its ranks exchange weights or activations in every layer.
    """
    groups, size, own, nodes = world
    if min(world) < 1 or size % own:
        raise PlanError(f"{counted(size, 'GPU')} of a group cannot be shared out to ranks of {own}")
    if groups % nodes:
        raise PlanError(
            f"{counted(groups, 'group')} of {counted(size, 'GPU')} cannot be divided over {counted(nodes, 'node')}",
            try_=f"{groups * nodes} groups, or groups of {max(1, size // nodes)}",
        )
    return world
