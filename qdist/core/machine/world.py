"""Which rank is where: groups of GPUs over the nodes of a run, and their arithmetic in one place.

Ranks are numbered node by node, and group by group within one, so that a group lies within a node wherever it can.
Rank, local rank and node are types of their own, so that mypy tells one from another.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
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
    """`groups` of `gpus_per_group` GPUs, `gpus_per_rank` of them to a rank, on one machine or several nodes."""

    groups: int
    gpus_per_group: int
    gpus_per_rank: int = 1
    nodes: tuple[int, ...] = ()
    """Ranks of each node, which may differ; empty for one machine, which has them all."""

    @property
    def size(self) -> int:
        """Processes of the run."""
        return self.groups * self.gpus_per_group // self.gpus_per_rank

    @property
    def ranks(self) -> tuple[Rank, ...]:
        return tuple(map(Rank, range(self.size)))

    @property
    def ranks_of_nodes(self) -> tuple[int, ...]:
        """Ranks of each node; of one machine, all of them."""
        return self.nodes or (self.size,)

    @property
    def spanning(self) -> bool:
        """Whether a group has ranks on several nodes, which exchange weights or activations in every layer."""
        return any(first * self.gpus_per_rank % self.gpus_per_group for first in _firsts(self.nodes))

    def ranks_on(self, node: Node) -> tuple[Rank, ...]:
        """The ranks of a node, in the order of their local ranks."""
        first = self._first_of(node)
        return tuple(map(Rank, range(first, first + self.ranks_of_nodes[node])))

    def node_of(self, rank: Rank) -> Node:
        return Node(bisect_right(_firsts(self.nodes), rank) - 1)

    def local_rank_of(self, rank: Rank) -> LocalRank:
        return LocalRank(rank - self._first_of(self.node_of(rank)))

    def rank_of(self, node: Node, local_rank: LocalRank) -> Rank:
        return Rank(self._first_of(node) + local_rank)

    def group_of(self, rank: Rank) -> int:
        return rank * self.gpus_per_rank // self.gpus_per_group

    def position_of(self, rank: Rank) -> int:
        """Place within the group: the shard of a sharded backbone, the first stage of a split one."""
        return rank * self.gpus_per_rank % self.gpus_per_group

    def gpus_of(self, rank: Rank) -> tuple[int, ...]:
        """The rank's GPUs, as its node numbers them."""
        first = self.local_rank_of(rank) * self.gpus_per_rank
        return tuple(range(first, first + self.gpus_per_rank))

    def _first_of(self, node: Node) -> int:
        return _firsts(self.nodes)[node]


@lru_cache(maxsize=8)
def _firsts(nodes: tuple[int, ...]) -> tuple[int, ...]:
    """The first rank of each node."""
    return tuple(accumulate(nodes[:-1], initial=0))


def is_even(nodes: Sequence[int]) -> bool:
    """Whether there are several nodes of several ranks each, and of equally many. nodes: ranks of each."""
    return len(nodes) > 1 and nodes[0] > 1 and len(set(nodes)) == 1


def used_gpus(groups: int, gpus_per_group: int, gpus: Sequence[int]) -> tuple[int, ...]:
    """GPUs that groups take of each node, of the `gpus` that it has.

    Groups stay within nodes where as many of them fit there, and what is left over of a node is idle; otherwise they
    span nodes and take all GPUs.
    """
    within = tuple(count // gpus_per_group * gpus_per_group for count in gpus)
    return within if sum(within) == groups * gpus_per_group else tuple(gpus)


def used_of(rooms: Sequence[int], groups: int, gpus_per_group: int, gpus: Sequence[int]) -> tuple[int, ...]:
    """Those of the GPUs' rooms, node by node, that groups use. gpus: of each node, as for `used_gpus`."""
    counts = zip(accumulate(gpus, initial=0), used_gpus(groups, gpus_per_group, gpus), strict=False)
    return tuple(room for start, count in counts for room in rooms[start : start + count])


def world_of(groups: int, gpus_per_group: int, *, size: int, nodes: Sequence[int] = ()) -> World:
    """The world of `size` ranks that share out the GPUs of all groups. nodes: ranks of each; empty for one machine."""
    return World(groups, gpus_per_group, groups * gpus_per_group // size, tuple(nodes))


def checked_world(world: World) -> World:
    """The world, if groups, ranks and nodes go into each other. Groups may span nodes: `spanning` says whether.

    Raises PlanError where ranks share a GPU group that their number of GPUs does not divide, or the nodes have other
    ranks than the groups.
    """
    groups, size, own, nodes = world
    if min(groups, size, own) < 1 or size % own:
        raise PlanError(f"{counted(size, 'GPU')} of a group cannot be shared out to ranks of {own}")
    if nodes and (min(nodes) < 1 or sum(nodes) != world.size):
        raise PlanError(
            f"{counted(groups, 'group')} of {counted(size, 'GPU')} cannot be divided over nodes of "
            f"{', '.join(map(str, nodes))} ranks"
        )
    return world
