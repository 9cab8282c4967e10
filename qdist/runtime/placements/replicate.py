"""Every rank holds the whole backbone."""

from qdist.core.machine.world import Rank
from qdist.runtime.placements.base import LoneRank


class Replicate(LoneRank):
    """One rank of a replicated backbone."""

    def sums_share(self) -> tuple[int, int]:
        """All of a GPU's own copy; CPU ranks of a node map the same bytes and split the verification."""
        if self.plan.device == "cuda":
            return 0, 1
        world = self.plan.world
        rank = Rank(self.rank)
        return world.local_rank_of(rank), len(world.ranks_on(world.node_of(rank)))
