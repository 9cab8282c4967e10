"""What would a layout need, and how fast would it be, for each micro-batch and way of checkpointing?"""

from collections.abc import Iterator
from functools import cached_property, partial
from itertools import accumulate
from math import ceil
from typing import Literal, NamedTuple

import msgspec

from qdist.core.machine.cluster import Rates
from qdist.core.planning.context import PlanningContext, micro_batches
from qdist.core.planning.fill import MicroBatch
from qdist.core.planning.graphs import why_eager
from qdist.core.planning.layer_map import least, scattered
from qdist.core.planning.memory import STAGE_WIDTH, MemoryBudget, Share, budget, load_peak_bytes, resident
from qdist.core.planning.network import Crossing, Exchanged, crossing_of
from qdist.core.planning.placements.base import Layout
from qdist.core.planning.plan import Fill
from qdist.core.planning.process_memory import (
    OWN_PAGES_BYTES,
    cuda_context_bytes,
    graph_bytes,
    hole_bytes,
    library_bytes,
    narrow_context_bytes,
    resident_set,
)
from qdist.core.planning.speed import Passes, Step, passes, step_seconds

USABLE_SHARE = 0.95
"""Share of a GPU, or of host memory, that a plan may fill."""


class Candidate(NamedTuple):
    """A way to run, with what it needs. Tuples are over the positions of a group; one where all GPUs do the same."""

    layout: Layout
    micro_batch: int
    micro_batches: int
    """Micro-batches of a rank and step; the mean of packed ones, rounded up."""
    checkpointed: int
    layer_map: tuple[int, ...]
    offloaded: tuple[int, ...]
    budgets: tuple[MemoryBudget, ...]
    load_peaks: tuple[int, ...]
    rooms: tuple[int, ...] | None
    seconds: float
    """Seconds per optimizer step; 0 if the device's speed is unknown."""
    paged: bool
    """Whether the optimizer's moments are in paged memory: on request, or because they would not fit otherwise."""
    packed: bool = False
    fill: Fill | None = None
    """How full its micro-batches are; None if all samples count as the longest."""
    network_bytes: float = 0.0
    """Bytes that a node sends to others in a step; 0 on one machine."""
    network_s: float = 0.0
    """Seconds that the network adds to a step: those of `seconds`, or of CPU ranks, whose speed is unknown, besides."""

    @property
    def network_share(self) -> float:
        """Share of a step that the network adds; 0 if the device's speed is unknown."""
        return self.network_s / self.seconds if self.seconds else 0.0

    @property
    def required_bytes(self) -> int:
        """Bytes required on the fullest GPU."""
        return max(self.needs)

    @property
    def needs(self) -> tuple[int, ...]:
        """Bytes required at each position, loading included."""
        return tuple(max(own.required, peak) for own, peak in zip(self.budgets, self.load_peaks, strict=True))

    @property
    def missing(self) -> tuple[int, int]:
        """(bytes, position) of the largest shortfall; negative bytes if there is room."""
        assert self.rooms is not None
        return max((need - room, at) for at, (need, room) in enumerate(zip(self.needs, self.rooms, strict=True)))

    @property
    def fits(self) -> bool:
        """Whether every GPU has room for it."""
        return self.rooms is None or self.missing[0] <= 0

    @property
    def roomy(self) -> bool:
        """Whether every GPU has room for everything, pageable moments included."""
        return self.fits and _hold(self.rooms, self.budgets)


def _hold(rooms: tuple[int, ...] | None, budgets: tuple[MemoryBudget, ...]) -> bool:
    return rooms is None or all(own.total <= room for own, room in zip(budgets, rooms, strict=True))


def options(setting: PlanningContext, layout: Layout) -> Iterator[Candidate]:
    """One for each micro-batch, the largest first, with as few layers recomputed as fit."""
    for size in micro_batches(setting, layout):
        yield _fewest_recomputed(setting, layout, size)


def offloading(setting: PlanningContext, layout: Layout) -> Iterator[Candidate]:
    """Like `options`, with as few layers offloaded to host memory as possible; every layer is recomputed."""
    layers = setting.sizes.facts.layer_count
    most = min(layers, int(USABLE_SHARE * setting.host_bytes) // setting.sizes.widest_layer)
    recomputed = 0 if setting.spec.train.checkpointing is False else layers

    def fewest(size: MicroBatch) -> Candidate:
        away = partial(arrange, setting, layout, size, recomputed)
        return away(least(lambda count: away(count).fits, 0, most))

    return map(fewest, micro_batches(setting, layout))


def _fewest_recomputed(setting: PlanningContext, layout: Layout, size: MicroBatch) -> Candidate:
    wanted, layers = setting.spec.train.checkpointing, setting.sizes.facts.layer_count
    away = setting.spec.split.offload_layers or 0

    def with_(recomputed: int) -> Candidate:
        return arrange(setting, layout, size, recomputed, away)

    if wanted is not None:
        return with_(layers if wanted else 0)
    if (free := with_(0)).roomy:
        return free
    if layout.positions > 1:
        return with_(layers)  # the slowest stage sets the pace: all recompute, or none
    # Moments that leave the GPU cross the bus twice a step, which costs more than recomputing saves.
    return with_(least(lambda count: with_(count).roomy, 1, layers) if with_(layers - 1).roomy else layers)


def arrange(setting: PlanningContext, layout: Layout, size: MicroBatch, recomputed: int, away: int = 0) -> Candidate:
    """Lay out one candidate: layer map, memory of each GPU of a group, seconds per step."""
    return _Arrangement(setting, layout, size, recomputed, away).candidate()


class _Arrangement:
    """The steps of `arrange`, with the arguments that they share."""

    def __init__(self, setting: PlanningContext, layout: Layout, size: MicroBatch, recomputed: int, away: int) -> None:
        self.setting, self.layout, self.recomputed = setting, layout, recomputed
        self.size, self.packed = size
        self.sizes, self.facts = setting.sizes, setting.sizes.facts
        self.layers = self.facts.layer_count
        self.offloaded = scattered(self.layers, away)
        self.batches = setting.batches(layout)
        # Unpacked rows of a pipeline's step are all as wide as its longest.
        counted = layout.stages == 1 or self.packed
        self.fill = self.batches.fill_of(size) if counted else self.batches.estimate(size)
        whole = setting.spec.batch // (self.size * layout.data_parallel)
        self.mean_micro_batches = max(1, self.fill.micro_batches if self.fill else whole)
        self.micro_batches = ceil(self.mean_micro_batches)
        self.positions = layout.positions

    def candidate(self) -> Candidate:
        layer_map = self.layout.layer_map(self)
        counts = self._counts(layer_map) if layer_map else [self.facts.counts(0, self.layers)]
        shares = [self._share(at, count, self._away(layer_map, at)) for at, count in enumerate(counts)]
        budgets = tuple(budget(self.setting.sizes, share) for share in shares)
        if self.setting.rooms is None:
            budgets = tuple(map(self._resident_set, shares, budgets))
        paged = self.setting.sizes.job.paged
        if paged and self.setting.spec.optim.name is None and _hold(self.rooms, budgets):
            budgets, paged = tuple(map(resident, budgets)), False
        seconds, network_s = self._seconds(shares, budgets, paged=paged)
        return Candidate(
            layout=self.layout,
            micro_batch=self.size,
            packed=self.packed,
            fill=self.fill,
            micro_batches=self.micro_batches,
            checkpointed=self.recomputed,
            layer_map=layer_map,
            offloaded=self.offloaded,
            budgets=budgets,
            load_peaks=tuple(load_peak_bytes(self.setting.sizes, share) for share in shares),
            rooms=self.rooms,
            seconds=seconds,
            paged=paged,
            network_bytes=self.crossing.bytes,
            network_s=network_s,
        )

    @cached_property
    def graphs(self) -> bool:
        """Whether the passes of a micro-batch are captured."""
        device: Literal["cuda", "cpu"] = "cpu" if self.setting.rooms is None else "cuda"
        setting = self.setting
        return not why_eager(
            setting.spec, self.facts, self.layout, device=device, compute_dtype=setting.dtype, config=setting.config,
            recomputed=self.recomputed, offloaded=len(self.offloaded),
        )  # fmt: skip

    @cached_property
    def rooms(self) -> tuple[int, ...] | None:
        """Bytes of room at each position, the least over all groups: they share one layer map."""
        rooms = self.setting.rooms
        if rooms is None:
            return None
        used = self.setting.used(self.layout, rooms)
        return tuple(min(used[at :: self.positions]) for at in range(self.positions))

    def _counts(self, layer_map: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Layers of each position, by run."""
        numbers = [layer_map.count(position) for position in range(self.positions)]
        starts = accumulate(numbers, initial=0)
        return [self.facts.counts(start, number) for start, number in zip(starts, numbers, strict=False)]

    def required(self, position: int, counts: tuple[int, ...]) -> int:
        """Bytes required at a position for these counts of layers by run, loading included."""
        share = self._share(position, counts, counts if self.offloaded else ())
        return max(budget(self.sizes, share).required, load_peak_bytes(self.sizes, share))

    def held(self, position: int, counts: tuple[int, ...]) -> int:
        """Bytes required at a position during a step, with no layer offloaded."""
        return budget(self.sizes, self._share(position, counts)).required

    def _share(self, position: int, counts: tuple[int, ...], away: tuple[int, ...] = ()) -> Share:
        number = sum(counts)
        own = Share(
            layers=counts,
            checkpointed=number if self.positions > 1 and self.recomputed else min(number, self.recomputed),
            micro_batch=self.size,
            positions=self.fullest[0],
            learned=self.fullest[1],
            gradient_accumulation=self.micro_batches,
            embedding=position == 0,
            head=position == self.positions - 1,
            whole_tables=self.setting.whole_tables,
            zero_stage=self.layout.zero_stage,
            data_parallel=self.layout.data_parallel,
            narrow=self._is_narrow,
            persistent_gradients=self.graphs,
            offloaded=away,
            context_bytes=self._context_bytes(position),
        )
        return self.layout.share(own, position)

    @property
    def _is_narrow(self) -> bool:
        """Whether gradients cross between ranks in 16 bits."""
        return self.layout.data_parallel > 1 and self.setting.spec.optim.reduce_dtype != "float32"

    @cached_property
    def fullest(self) -> tuple[int, int]:
        """(positions, learned tokens) of the fullest micro-batch; zeros if not counted, or if all are full."""
        if self.packed:
            return 0, 0
        counted = {len(own.learned): own for own in self.setting.fullest if own.samples == self.size}
        ranks = self.layout.data_parallel
        own, rank = counted.get(ranks, counted.get(1)), self.setting.rank if ranks in counted else None
        if own is None:
            return 0, 0
        positions = max(own.positions) if rank is None else own.positions[rank]
        if self.layout.stages > 1:
            positions = self.size * -(-positions // self.size // STAGE_WIDTH) * STAGE_WIDTH
        return positions, max(own.learned) if rank is None else own.learned[rank]

    def _resident_set(self, share: Share, own: MemoryBudget) -> MemoryBudget:
        """A budget turned into that of a CPU rank; the first stage of a pipeline saves the adapter of all stages."""
        sizes, gathers = self.setting.sizes, share.pipelined and share.embedding
        large = share.tokens(sizes.job.seq_len) * sizes.entering_token >= OWN_PAGES_BYTES
        return resident_set(
            own,
            holes=hole_bytes(sizes.job, self.layout, 0 if large else own.activations),
            copied=sizes.trained(self.facts.counts(0, self.layers) if gathers else share.layers),
            alone=self.layout.world_size == 1,
        )

    def _context_bytes(self, position: int) -> int:
        """Bytes that a rank holds beyond the terms of the budget."""
        if self.setting.rooms is None:
            return library_bytes(self.layout)
        learnt = self.setting.correction.context_bytes if self.setting.correction else None
        context = cuda_context_bytes(self.layout, position) if learnt is None else learnt
        if self._is_narrow:
            context += narrow_context_bytes(self.setting.world(self.layout))
        return context + self.graphs * graph_bytes(self.layers)

    def _away(self, layer_map: tuple[int, ...], position: int) -> tuple[int, ...]:
        """Offloaded layers of a position, by run."""
        return self.facts.runs([index for index in self.offloaded if layer_map[index] == position])

    def times(self) -> tuple[list[float], float]:
        """Cost of a layer of each run on its stage, and of the head on the last: seconds, or weights."""
        if self.setting.rates is None:
            return [float(shape.linear_parameters) for shape in self.facts.shapes], self.facts.vocab * self.facts.hidden
        one = self._passes(self.setting.rates)
        each = zip(one.forward_s, one.backward_s, one.recomputed_s, strict=True)
        return [there + back + again * (self.recomputed > 0) for there, back, again in each], one.head_s

    def _passes(self, rates: Rates) -> Passes:
        """Time of a micro-batch that is as full as the data make it."""
        if self.fill is None:
            return passes(self.sizes, rates, self.size, graphs=self.graphs)
        mean, data = self.batches.mean_length, self.setting.data
        if self.packed:
            attended = ceil(data.attended if data else 0) or ceil(mean)
            return passes(self.sizes, rates, self.size, attended=attended, packed=True, graphs=self.graphs)
        width = round(mean / self.fill.share)
        return passes(self.sizes, rates, self.size, tokens=self.size * width, attended=width, graphs=self.graphs)

    @cached_property
    def crossing(self) -> Crossing:
        """What a step sends between nodes."""
        layout, sizes = self.layout, self.setting.sizes
        tables = 0 if self.setting.whole_tables or self.facts.tied_embeddings else sizes.embedding + sizes.head
        # Two buffers take turns: the backward pass finds the last two layers where the forward pass left them.
        again = self.facts.counts(0, max(0, self.layers - 2))
        every = self.facts.counts(0, self.layers)
        width = round(self.batches.mean_length / self.fill.share) if self.fill else sizes.job.seq_len
        return crossing_of(
            Exchanged(
                world=self.setting.world(layout),
                data_parallel=layout.data_parallel,
                stages=layout.stages,
                engine=layout.engine,
                zero_stage=layout.zero_stage,
                micro_batches=self.mean_micro_batches,
                trained=sizes.trained(every),
                narrow=self._is_narrow,
                on_gpus=self.setting.rooms is not None,
                gathered_bytes=sizes.packed(every) + sizes.packed(again) + tables,
                gathers=sum(every) + sum(again) + 2 * (tables > 0),
                token_bytes=self.size * (sizes.job.seq_len if self.packed else width) * sizes.entering_token,
            )
        )

    def _seconds(self, shares: list[Share], budgets: tuple[MemoryBudget, ...], *, paged: bool) -> tuple[float, float]:
        """Seconds of a step, and those of them that the network adds; of CPU ranks only the latter are known."""
        rates, layout, network = self.setting.rates, self.layout, self.setting.network
        across = self.crossing.gradient_seconds(network)
        if rates is None or self.rooms is None:
            return 0.0, across + self.crossing.group_seconds(network)
        over = max(own.total - int(room / USABLE_SHARE) for own, room in zip(budgets, self.rooms, strict=True))
        step = Step(
            counts=tuple(share.layers for share in shares),
            checkpointed=self.recomputed,
            micro_batches=self.mean_micro_batches,
            zero_stage=layout.zero_stage,
            ranks=layout.data_parallel,
            shards=shares[0].shards,
            pipelined=shares[0].pipelined,
            offloaded=self.facts.runs(self.offloaded),
            graphs=self.graphs,
            paged=paged,
            paged_out_bytes=max(0, min(over, max(own.pageable for own in budgets))),
        )
        one = self._passes(rates)
        correction = self.setting.correction
        learnt = correction.speed_of(layout.placement) if correction else 1.0
        local = step_seconds(self.setting.sizes, rates, one, step) / learnt
        if self.setting.world(layout).spanning:
            spanning = msgspec.structs.replace(step, network=network)
            across += step_seconds(self.setting.sizes, rates, one, spanning) / learnt - local
        return local + across, across
