"""Every rank holds the whole backbone."""

from qdist.runtime.placements.base import Rank


class Replicate(Rank):
    """One rank of a replicated backbone."""

    def sums_share(self) -> tuple[int, int]:
        """All of a GPU's own copy; CPU ranks of a node map the same bytes and split the verification."""
        if self.plan.device == "cuda":
            return 0, 1
        node = self.plan.ranks[self.rank].node
        together = [other.rank for other in self.plan.ranks if other.node == node]
        return together.index(self.rank), len(together)
