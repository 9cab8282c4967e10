"""Every GPU holds the whole backbone: the fastest and simplest placement, if it fits."""

from collections.abc import Iterator

from qdist.core.errors import SpecError
from qdist.core.planning.placements.base import Layout, Placement, Wanted, unit_of
from qdist.core.planning.plan import Plan


class Replicated(Layout, frozen=True):
    """Ranks that share nothing but the adapter's state."""

    placement = "replicate"

    def in_words(self, plan: Plan) -> str:
        return f"replicate: each {unit_of(plan)} holds the whole backbone"


class Replicate(Placement):
    """One rank a GPU, each a group of its own."""

    name = "replicate"
    kinds = (Replicated,)

    def check(self, wanted: Wanted) -> None:
        size = wanted.spec.gpus_per_group
        if self.is_named(wanted.spec) and size not in (None, 1):
            raise SpecError(
                f"gpus_per_group={size}, but placement=replicate puts the whole backbone on each {wanted.unit}",
                ways=[{"placement": "shard"}, {"gpus_per_group": None}],
            )

    def layouts(self, wanted: Wanted) -> Iterator[Layout]:
        if wanted.spec.gpus_per_group in (None, 1):
            yield Replicated(groups=wanted.total, gpus_per_group=1).with_state(wanted.spec)
