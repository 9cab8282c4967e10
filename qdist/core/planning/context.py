"""What do all candidates of a run have in common, and which micro-batches are worth trying?"""

from collections.abc import Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

from qdist.core.machine.calibration import Correction
from qdist.core.machine.cluster import Network, Rates
from qdist.core.machine.world import World, used_gpus
from qdist.core.planning.fill import Batches, MicroBatch
from qdist.core.planning.memory import Sizes
from qdist.core.planning.network import ASSUMED
from qdist.core.planning.placements.base import Layout
from qdist.core.planning.plan import DataFacts, Fullest
from qdist.core.spec.run_spec import RunSpec

MAX_MICRO_BATCH_TOKENS, MAX_CPU_MICRO_BATCH_TOKENS = 8192, 2048
"""Tokens of a micro-batch beyond which throughput no longer grows, only memory."""


class PlanningContext(NamedTuple):
    """Inputs shared by all candidates of a run."""

    spec: RunSpec
    sizes: Sizes
    rooms: tuple[int, ...] | None
    """Bytes of each GPU that the plan may fill; None for CPU ranks, which share the machine's memory."""
    host_bytes: int
    rates: Rates | None
    whole_tables: bool
    correction: Correction | None
    data: DataFacts | None = None
    usual: MicroBatch | None = None
    """What the run had before it was resumed."""
    unpackable: str = ""
    """Why the model cannot keep packed samples apart; empty if it can."""
    new_rows: int = 0
    """Vocabulary rows to be trained."""
    fullest: tuple[Fullest, ...] = ()
    """Fullest micro-batches of CPU ranks, whose memory depends on the data; empty on GPUs."""
    dtype: str = "bfloat16"
    """What products are computed in."""
    config: Mapping[str, Any] = MappingProxyType({})
    """Content of the model's config.json."""
    nodes: tuple[int, ...] = ()
    """GPUs or CPU ranks of each node; empty for one machine."""
    network: Network = ASSUMED
    """The network between nodes, where there are several."""
    rank: int | None = None
    """Data-parallel rank whose micro-batches to take from `fullest`; None for the fullest of all ranks."""

    def batches(self, layout: Layout) -> Batches:
        """The samples of a step, as a layout's ranks share them."""
        longest = self.sizes.job.seq_len
        return Batches(self.data, self.spec.batch, layout.data_parallel, longest, least=layout.stages)

    def world(self, layout: Layout) -> World:
        """A layout's ranks on their nodes."""
        return layout.world_on(self.nodes)

    def used(self, layout: Layout, rooms: tuple[int, ...]) -> tuple[int, ...]:
        """Those of the GPUs' rooms that a layout uses."""
        if not self.nodes:
            return rooms[: layout.groups * layout.gpus_per_group]
        counts = used_gpus(layout.groups, layout.gpus_per_group, self.nodes)
        starts = accumulate(self.nodes, initial=0)
        return tuple(
            room for start, count in zip(starts, counts, strict=False) for room in rooms[start : start + count]
        )

    def packs(self, layout: Layout) -> bool:
        """Whether a layout's micro-batches are packed: as set, as before a resume, or where that is worth it."""
        if not layout.packs or self.unpackable:
            return False
        if self.spec.pack is not None:
            return self.spec.pack
        if self.usual:
            return self.usual.packed
        was_read = self.data is not None and bool(self.data.path)
        return self.rooms is not None and was_read and bool(_packed_sizes(self, layout))


def micro_batches(setting: PlanningContext, layout: Layout) -> list[MicroBatch]:
    """Micro-batches to try. A pipeline needs at least as many as it has stages."""
    spec, stages, packed = setting.spec, layout.stages, setting.packs(layout)
    each = spec.batch // layout.data_parallel
    if spec.micro_batch:
        return [MicroBatch(spec.micro_batch, packed)]
    usual = setting.usual
    if usual and usual.packed and packed:
        return [MicroBatch(min(usual.samples, max(1, each)), packed=True)]  # a row wider than that would be padding
    if usual and usual.packed == packed and each % usual.samples == 0 and each // usual.samples >= stages:
        return [usual]
    if packed:
        return [MicroBatch(size, packed=True) for size in _packed_sizes(setting, layout)]
    most = min(each // stages, _ceiling(setting))
    return [MicroBatch(size) for size in range(most, 0, -1) if each % size == 0] or [MicroBatch(1)]


def _ceiling(setting: PlanningContext) -> int:
    """Whole sequences of a micro-batch beyond which throughput no longer grows."""
    tokens = MAX_MICRO_BATCH_TOKENS if setting.rooms is not None else MAX_CPU_MICRO_BATCH_TOKENS
    return tokens // setting.sizes.job.seq_len


def _packed_sizes(setting: PlanningContext, layout: Layout) -> list[int]:
    """Sizes of packed micro-batches to try, those with the fewest positions a step first; any size works.

    Empty if the setting is the planner's to decide and no size is worth it.
    """
    batches, own = setting.batches(layout), setting.spec.micro_batch
    found = [own] if own else batches.packed_sizes(_ceiling(setting))
    if setting.spec.pack is None:
        found = [size for size in found if batches.is_worth_packing(size)]
    return sorted(found, key=lambda size: (batches.packed_positions(size), -size))
