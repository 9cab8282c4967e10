"""Every GPU holds a part of every layer and gathers the whole just in time."""

from collections.abc import Iterator

import msgspec

from qdist.core.errors import SpecError
from qdist.core.planning.memory import Share
from qdist.core.planning.placements.base import Layout, Placement, Wanted, groups_in_words, unit_of
from qdist.core.planning.plan import Plan


class Sharded(Layout, frozen=True):
    """Ranks that each hold 1/k of every layer's packed bytes; the adapter is whole on each."""

    placement = "shard"

    def unmapped(self) -> SpecError | None:
        message = "a device_map lays whole layers, and each GPU of a shard has a part of every one"
        return SpecError(message, try_="--placement split")

    def share(self, own: Share, position: int) -> Share:
        return msgspec.structs.replace(own, shards=self.gpus_per_group)

    def why_slower(self, winner: Layout, micro_batches: int) -> str:
        return "" if isinstance(winner, Sharded) else "gathers every layer for every pass"

    @property
    def overhead(self) -> str:
        return f"gathers from {self.gpus_per_group} GPUs"

    def in_words(self, plan: Plan) -> str:
        part = f"each {unit_of(plan)} holds 1/{self.gpus_per_group} of every layer and gathers it for use"
        return f"shard: {groups_in_words(plan)}; {part}"


class Shard(Placement):
    """Groups of any size above 1."""

    name = "shard"
    kinds = (Sharded,)

    def layouts(self, wanted: Wanted) -> Iterator[Layout]:
        for size in wanted.sizes:
            if size > 1:
                yield Sharded(groups=wanted.groups_of(size), gpus_per_group=size).with_state(wanted.spec)
            elif wanted.named:
                raise wanted.too_few("placement=shard")
