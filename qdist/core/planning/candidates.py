"""What would a layout need, and how fast would it be, for each micro-batch and way of checkpointing?"""

from collections.abc import Iterator
from functools import cached_property, partial
from itertools import accumulate
from typing import NamedTuple

from qdist.core.machine.calibration import Correction
from qdist.core.machine.cluster import Rates
from qdist.core.planning.layer_map import balance, least, map_of, pace, scattered, spread_layers
from qdist.core.planning.layouts import Layout
from qdist.core.planning.memory import STAGE_WIDTH, MemoryBudget, Share, Sizes, budget, load_peak_bytes, resident
from qdist.core.planning.plan import Fullest
from qdist.core.planning.process_memory import (
    OWN_PAGES_BYTES,
    cuda_context_bytes,
    hole_bytes,
    library_bytes,
    resident_set,
)
from qdist.core.planning.speed import Step, passes, step_seconds
from qdist.core.spec.spec import RunSpec

RECEIVED_AHEAD = 1
"""Micro-batches that each neighbour of a stage has sent, or is sending, before they are used; then activations."""
HEADROOM = 0.95
"""Share of a GPU, or of host memory, that a plan may fill."""
MAX_MICRO_BATCH_TOKENS, MAX_CPU_MICRO_BATCH_TOKENS = 8192, 2048
"""Tokens of a micro-batch beyond which throughput no longer grows, only memory."""


class Setting(NamedTuple):
    """What all candidates of a run share."""

    spec: RunSpec
    sizes: Sizes
    rooms: tuple[int, ...] | None
    """Bytes that the plan may fill of each GPU; None for CPU ranks, which share the machine's memory."""
    host_bytes: int
    rates: Rates | None
    whole_tables: bool
    correction: Correction | None
    usual_micro_batch: int | None = None
    new_rows: int = 0
    """Of the vocabulary, to be trained."""
    fullest: tuple[Fullest, ...] = ()
    """The micro-batches of CPU ranks, whose memory goes with what the data hold; empty on GPUs."""
    rank: int | None = None
    """The data-parallel one whose micro-batches they are to be; None for the fullest of all."""


class Candidate(NamedTuple):
    """A way to run, with what it needs. Tuples are over the positions of a group; one where all GPUs do the same."""

    layout: Layout
    micro_batch: int
    micro_batches: int
    checkpointed: int
    layer_map: tuple[int, ...]
    offloaded: tuple[int, ...]
    budgets: tuple[MemoryBudget, ...]
    load_peaks: tuple[int, ...]
    rooms: tuple[int, ...] | None
    seconds: float
    """Of a step; 0 where nothing is known of the device."""
    paged: bool
    """The optimizer's moments are in paged memory: by request, or because they would not fit otherwise."""

    @property
    def required_bytes(self) -> int:
        """Of the fullest GPU."""
        return max(self.needs)

    @property
    def needs(self) -> tuple[int, ...]:
        """Bytes that each position cannot do without, loading included."""
        return tuple(max(own.required, peak) for own, peak in zip(self.budgets, self.load_peaks, strict=True))

    @property
    def missing(self) -> tuple[int, int]:
        """(bytes, position) where most is missing; negative where there is room."""
        assert self.rooms is not None
        return max((need - room, at) for at, (need, room) in enumerate(zip(self.needs, self.rooms, strict=True)))

    @property
    def fits(self) -> bool:
        """Whether every GPU has room for it."""
        return self.rooms is None or self.missing[0] <= 0

    @property
    def roomy(self) -> bool:
        """Whether every GPU has room for all of it: moments that could leave as well."""
        return self.fits and _hold(self.rooms, self.budgets)


def _hold(rooms: tuple[int, ...] | None, budgets: tuple[MemoryBudget, ...]) -> bool:
    return rooms is None or all(own.total <= room for own, room in zip(budgets, rooms, strict=True))


def options(setting: Setting, layout: Layout) -> Iterator[Candidate]:
    """One for each micro-batch, the largest first, with as few layers recomputed as fit."""
    for size in micro_batches(setting, layout):
        yield _fewest_recomputed(setting, layout, size)


def offloading(setting: Setting, layout: Layout) -> Iterator[Candidate]:
    """As `options`, with as few layers in host memory as fit; every layer is recomputed."""
    layers = setting.sizes.facts.layer_count
    most = min(layers, int(HEADROOM * setting.host_bytes) // setting.sizes.widest_layer)
    recomputed = 0 if setting.spec.train.checkpointing is False else layers

    def fewest(size: int) -> Candidate:
        away = partial(arrange, setting, layout, size, recomputed)
        return away(least(lambda count: away(count).fits, 0, most))

    return map(fewest, micro_batches(setting, layout))


def micro_batches(setting: Setting, layout: Layout) -> list[int]:
    """Sizes to try. A pipeline wants at least as many micro-batches as it has stages."""
    spec, seq_len = setting.spec, setting.sizes.job.seq_len
    each = spec.global_batch // layout.data_parallel
    if spec.micro_batch:
        return [spec.micro_batch]
    stages = layout.gpus_per_group if layout.schedule == "1f1b" else 1
    usual = setting.usual_micro_batch
    if usual and each % usual == 0 and each // usual >= stages:
        return [usual]
    ceiling = MAX_MICRO_BATCH_TOKENS if setting.rooms is not None else MAX_CPU_MICRO_BATCH_TOKENS
    most = min(each // stages, ceiling // seq_len)
    return [size for size in range(most, 0, -1) if each % size == 0] or [1]


def _fewest_recomputed(setting: Setting, layout: Layout, size: int) -> Candidate:
    wanted, layers = setting.spec.train.checkpointing, setting.sizes.facts.layer_count
    away = setting.spec.split.offload_layers or 0

    def with_(recomputed: int) -> Candidate:
        return arrange(setting, layout, size, recomputed, away)

    if wanted is not None:
        return with_(layers if wanted else 0)
    if (free := with_(0)).roomy:
        return free
    if layout.placement == "split" and layout.gpus_per_group > 1:
        return with_(layers)  # the slowest stage sets the pace: all recompute, or none
    # Moments that leave the GPU cross the bus twice a step, which costs more than recomputing saves.
    return with_(least(lambda count: with_(count).roomy, 1, layers) if with_(layers - 1).roomy else layers)


def arrange(setting: Setting, layout: Layout, size: int, recomputed: int, away: int = 0) -> Candidate:
    """Lay out one candidate: layer map, the memory of each GPU of a group, the time of a step."""
    return _Arrangement(setting, layout, size, recomputed, away).candidate()


class _Arrangement:
    """The steps of `arrange`, which share what they are asked."""

    def __init__(self, setting: Setting, layout: Layout, size: int, recomputed: int, away: int) -> None:
        self.setting, self.layout, self.size, self.recomputed = setting, layout, size, recomputed
        self.facts = setting.sizes.facts
        self.layers = self.facts.layer_count
        self.offloaded = scattered(self.layers, away)
        self.micro_batches = max(1, setting.spec.global_batch // (size * layout.data_parallel))
        self.split = layout.placement == "split"
        self.positions = layout.gpus_per_group if self.split else 1

    def candidate(self) -> Candidate:
        layer_map = self._layer_map() if self.split else ()
        counts = self._counts(layer_map) if self.split else [self.facts.counts(0, self.layers)]
        shares = [self._share(at, count, self._away(layer_map, at)) for at, count in enumerate(counts)]
        if self.setting.rooms is None and self.layout.schedule == "sequential":
            shares = [self._alone()]
        budgets = tuple(budget(self.setting.sizes, share) for share in shares)
        if self.setting.rooms is None:
            budgets = tuple(map(self._resident_set, shares, budgets))
        paged = self.setting.sizes.job.paged
        if paged and self.setting.spec.optim.name is None and _hold(self.rooms, budgets):
            budgets, paged = tuple(map(resident, budgets)), False
        return Candidate(
            layout=self.layout,
            micro_batch=self.size,
            micro_batches=self.micro_batches,
            checkpointed=self.recomputed,
            layer_map=layer_map,
            offloaded=self.offloaded,
            budgets=budgets,
            load_peaks=tuple(load_peak_bytes(self.setting.sizes, share) for share in shares),
            rooms=self.rooms,
            seconds=self._seconds(counts, budgets, paged=paged),
            paged=paged,
        )

    @cached_property
    def rooms(self) -> tuple[int, ...] | None:
        """The least room that a position has in any group: all groups share one layer map."""
        rooms = self.setting.rooms
        if rooms is None:
            return None
        used = rooms[: self.layout.groups * self.layout.gpus_per_group]
        return tuple(min(used[at :: self.positions]) for at in range(self.positions))

    def _counts(self, layer_map: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Layers of each position, by run."""
        numbers = [layer_map.count(position) for position in range(self.positions)]
        starts = accumulate(numbers, initial=0)
        return [self.facts.counts(start, number) for start, number in zip(starts, numbers, strict=False)]

    def _layer_map(self) -> tuple[int, ...]:
        if self.positions == 1:
            return (0,) * self.layers
        if self.layout.schedule == "1f1b":
            return map_of(self._stages())
        return self._spread()

    def _spread(self) -> tuple[int, ...]:
        """The layer map of one process: every GPU as full, for its room, as the others."""
        sizes, runs, run_of_layer = self.setting.sizes, range(len(self.facts.layers)), self.facts.run_of_layer
        one, two = (
            [budget(sizes, self._share(1, self._of_run(run, count))).required for run in runs] for count in (1, 2)
        )
        each = [more - less for less, more in zip(one, two, strict=True)]
        layer_bytes = [each[run] for run in run_of_layer]
        for layer in self.offloaded:
            layer_bytes[layer] -= sizes.layers[run_of_layer[layer]].packed
        if self.rooms is None:
            return spread_layers(layer_bytes, [1] * self.positions)
        useful = (
            room - max(self._required(at, self._of_run(run, 1)) - each[run] for run in runs)
            for at, room in enumerate(self.rooms)
        )
        return spread_layers(layer_bytes, list(useful))

    def _stages(self) -> tuple[int, ...]:
        """Layers of each stage: those for which all have memory, or, where there is no such way, as if they had."""
        times, head = self._times()
        extra = [0.0] * (self.positions - 1) + [head]
        if len(times) > 1:
            each = [times[run] for run in self.facts.run_of_layer]
            counts = pace(each, extra, self._holds) or pace(each, extra, lambda *_: True)
        else:
            extra[-1] /= times[0]
            most = [self._most(at) for at in range(self.positions)]
            counts = balance(self.layers, most, extra) or balance(self.layers, [self.layers] * self.positions, extra)
        assert counts is not None
        return counts

    def _of_run(self, run: int, count: int) -> tuple[int, ...]:
        """So many layers of one run."""
        return tuple(count * (run == other) for other in range(len(self.facts.layers)))

    def _holds(self, position: int, first: int, number: int) -> bool:
        """Whether a stage has memory for so many layers from `first` on."""
        return self.rooms is None or self._required(position, self.facts.counts(first, number)) <= self.rooms[position]

    def _most(self, position: int) -> int:
        """Layers for which a stage has memory, where all are alike."""
        return least(lambda count: not self._holds(position, 0, count + 1), 0, self.layers)

    def _required(self, position: int, counts: tuple[int, ...]) -> int:
        share = self._share(position, counts, counts if self.offloaded else ())
        return max(budget(self.setting.sizes, share).required, load_peak_bytes(self.setting.sizes, share))

    def _share(self, position: int, counts: tuple[int, ...], away: tuple[int, ...] = ()) -> Share:
        layout, last = self.layout, self.positions - 1
        pipelined = layout.schedule == "1f1b"
        neighbours = (position > 0) + (position < last)
        number = sum(counts)
        return Share(
            layers=counts,
            checkpointed=number if self.positions > 1 and self.recomputed else min(number, self.recomputed),
            micro_batch=self.size,
            positions=self.fullest[0],
            learned=self.fullest[1],
            gradient_accumulation=self.micro_batches,
            embedding=position == 0,
            head=position == last,
            shards=layout.gpus_per_group if layout.placement == "shard" else 1,
            whole_tables=self.setting.whole_tables,
            zero_stage=layout.zero_stage,
            data_parallel=layout.data_parallel,
            pipelined=pipelined,
            in_flight=min(self.micro_batches, self.positions - position) if pipelined else 1,
            received=RECEIVED_AHEAD * neighbours if pipelined else 0,
            sends=pipelined and position < last,
            offloaded=away,
            context_bytes=self._context_bytes(neighbours if pipelined else 0),
        )

    def _alone(self) -> Share:
        """One CPU process that holds what would lie on several GPUs."""
        return Share(
            layers=self.facts.counts(0, self.layers), checkpointed=self.recomputed, micro_batch=self.size,
            positions=self.fullest[0], learned=self.fullest[1],
            gradient_accumulation=self.micro_batches, context_bytes=self._context_bytes(),
        )  # fmt: skip

    @cached_property
    def fullest(self) -> tuple[int, int]:
        """(positions, learned tokens) of the fullest micro-batch, zeros where nobody has counted."""
        counted = {len(own.learned): own for own in self.setting.fullest if own.samples == self.size}
        ranks = self.layout.data_parallel
        own, rank = counted.get(ranks, counted.get(1)), self.setting.rank if ranks in counted else None
        if own is None:
            return 0, 0
        positions = max(own.positions) if rank is None else own.positions[rank]
        if self.layout.schedule == "1f1b":
            positions = self.size * -(-positions // self.size // STAGE_WIDTH) * STAGE_WIDTH
        return positions, max(own.learned) if rank is None else own.learned[rank]

    def _resident_set(self, share: Share, own: MemoryBudget) -> MemoryBudget:
        """A budget as that of a CPU rank; the first stage of a pipeline saves the adapter of all of them."""
        sizes, gathers = self.setting.sizes, share.pipelined and share.embedding
        large = share.tokens(sizes.job.seq_len) * sizes.entering_token >= OWN_PAGES_BYTES
        return resident_set(
            own,
            holes=hole_bytes(sizes.job, self.layout, 0 if large else own.activations),
            copied=sizes.trained(self.facts.counts(0, self.layers) if gathers else share.layers),
            alone=self.layout.world_size == 1,
        )

    def _context_bytes(self, neighbours: int = 0) -> int:
        """What a rank holds beside what the budget counts."""
        if self.setting.rooms is None:
            return library_bytes(self.layout)
        if self.setting.correction and self.setting.correction.context_bytes is not None:
            return self.setting.correction.context_bytes
        return cuda_context_bytes(self.layout, neighbours)

    def _away(self, layer_map: tuple[int, ...], position: int) -> tuple[int, ...]:
        """Offloaded layers of a position, by run."""
        return self.facts.runs([index for index in self.offloaded if layer_map[index] == position])

    def _times(self) -> tuple[list[float], float]:
        """What a layer of each run takes of a stage, and what the head takes of the last: seconds, or weights."""
        if self.setting.rates is None:
            return [float(shape.linear_parameters) for shape in self.facts.shapes], self.facts.vocab * self.facts.hidden
        one, visits = passes(self.setting.sizes, self.setting.rates, self.size), 2 if self.recomputed else 1
        both = zip(one.forward_s, one.backward_s, strict=True)
        return [backward + forward * visits for forward, backward in both], one.head_s

    def _seconds(self, counts: list[tuple[int, ...]], budgets: tuple[MemoryBudget, ...], *, paged: bool) -> float:
        rates, layout = self.setting.rates, self.layout
        if rates is None or self.rooms is None:
            return 0.0
        over = max(own.total - int(room / HEADROOM) for own, room in zip(budgets, self.rooms, strict=True))
        step = Step(
            counts=tuple(counts),
            checkpointed=self.recomputed,
            micro_batches=self.micro_batches,
            zero_stage=layout.zero_stage,
            ranks=layout.data_parallel,
            shards=layout.gpus_per_group if layout.placement == "shard" else 1,
            sequential=layout.schedule == "sequential",
            offloaded=self.facts.runs(self.offloaded),
            paged=paged,
            paged_out_bytes=max(0, min(over, max(own.pageable for own in budgets))),
        )
        one = passes(self.setting.sizes, rates, self.size)
        correction = self.setting.correction
        learnt = correction.speed_of(layout.placement) if correction else 1.0
        return step_seconds(self.setting.sizes, rates, one, step) / learnt
