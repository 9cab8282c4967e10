"""Every GPU holds some whole layers: a rank a stage with micro-batches in flight, or one process over all GPUs."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import accumulate, groupby, pairwise
from typing import ClassVar

import msgspec

from qdist.core.errors import Change, SpecError
from qdist.core.model.shapes import ModelFacts
from qdist.core.planning.layer_map import balance, least, map_of, pace, spread_layers
from qdist.core.planning.memory import Share
from qdist.core.planning.placements.base import (
    OPEN,
    Arrangement,
    Layout,
    Placement,
    Wanted,
    divisors_of,
    groups_in_words,
    rows_in_words,
    unit_of,
)
from qdist.core.planning.plan import Plan
from qdist.core.spec.run_spec import RunSpec
from qdist.core.spec.sections import Split
from qdist.core.text import counted

RECEIVED_AHEAD = 1
"""Micro-batches that each neighbour of a stage has sent, or is sending, before they are used; then activations."""


class _OfLayers(Layout, frozen=True):
    """What both schedules share."""

    placement = "split"

    @property
    def positions(self) -> int:
        return self.gpus_per_group

    def impossible(self, spec: RunSpec, facts: ModelFacts) -> SpecError | None:
        """The error if the decoder cannot be cut at all, or not into so many parts."""
        if self.positions > 1 and facts.unsplit:
            return SpecError(f"{spec.model} cannot be split: the model {facts.unsplit}", ways=[_sharded(spec), OPEN])
        return super().impossible(spec, facts)

    def state_ways(self, spec: RunSpec) -> tuple[Layout, ...]:
        return (self,)

    def batch_in_words(self, plan: Plan) -> str:
        groups = f"{self.groups} groups x " if self.groups > 1 else ""
        if plan.packed:
            return f"{groups}{rows_in_words(plan)}"
        number = counted(plan.gradient_accumulation, "micro-batch", "es")
        return f"{groups}{number} of {counted(plan.micro_batch, 'sample')}"


class Pipeline(_OfLayers, frozen=True):
    """A rank a stage, with several micro-batches in flight."""

    schedule = "1f1b"

    @property
    def stages(self) -> int:
        return self.gpus_per_group

    def impossible(self, spec: RunSpec, facts: ModelFacts) -> SpecError | None:
        """The error if there are more stages than layers, or blocks of layers that stay together."""
        layers = len(_blocks(facts))
        if cut := super().impossible(spec, facts):
            return cut
        if self.stages <= layers:
            return None
        smaller = [size for size in divisors_of(self.groups * self.stages) if size <= layers]
        there = counted(layers, "layer")
        if facts.together_from is not None:
            there = f"{counted(facts.layer_count, 'layer')}, {_together(facts)}"
        return SpecError(
            f"{self.stages} stages need at least as many layers, and {spec.model} has {there}",
            ways=[
                *({"gpus_per_group": size} for size in smaller[-1:]),
                *({"gpus": number} for number in (layers,) if number > 1),
                OPEN,
            ],
        )

    def unable(self, spec: RunSpec, new_rows: int) -> SpecError | None:
        """The error for what needs a whole model, which no stage has."""
        if new_rows:
            rows = "a new row" if new_rows == 1 else f"{new_rows} new rows"
            return SpecError(
                f"the stages of a 1f1b split cannot train {rows} of the vocabulary", ways=[_sharded(spec), OPEN]
            )
        if spec.train.answers:
            return SpecError(
                f"the stages of a 1f1b split cannot generate the answers of train.answers={spec.train.answers}",
                ways=[{"train.answers": 0}, _sharded(spec)],
            )
        return None

    def layer_map(self, arrangement: Arrangement) -> tuple[int, ...]:
        return map_of(_layers_of_stages(self.stages, arrangement))

    def share(self, own: Share, position: int) -> Share:
        return msgspec.structs.replace(
            own,
            pipelined=True,
            in_flight=min(own.gradient_accumulation, self.stages - position),
            received=RECEIVED_AHEAD * self.neighbours(position),
            sends=position < self.stages - 1,
        )

    def why_slower(self, winner: Layout, micro_batches: int) -> str:
        return f"stages wait for each other: {micro_batches} micro-batches in {self.stages} stages"

    def in_words(self, plan: Plan) -> str:
        stage = f"each {unit_of(plan)} a stage of layers ({_spans(plan)}), micro-batches in flight (1F1B)"
        return f"split: {groups_in_words(plan)}; {stage}"


class OneProcess(_OfLayers, frozen=True):
    """One process that visits GPU after GPU: the only layout that can offload layers to host memory."""

    schedule = "sequential"
    packs = False

    def unable(self, spec: RunSpec, new_rows: int) -> SpecError | None:
        """The error for packed samples, whose ends do not visit GPU after GPU."""
        if not spec.pack:
            return None
        message = "one process over a split backbone does not pack, and pack=true asks for that"
        return SpecError(message, ways=[{"pack": None}, _sharded(spec), OPEN])

    @property
    def world_size(self) -> int:
        return 1

    def layer_map(self, arrangement: Arrangement) -> tuple[int, ...]:
        return _spread(arrangement) if self.positions > 1 else (0,) * arrangement.sizes.facts.layer_count

    def why_slower(self, winner: Layout, micro_batches: int) -> str:
        return "one GPU works at a time"

    @property
    def gpus_in_words(self) -> str:
        return f"one process on {super().gpus_in_words}"

    def in_words(self, plan: Plan) -> str:
        unit, away = unit_of(plan), len(plan.offloaded_layers)
        visited = f"{unit} after {unit}, layers {_spans(plan)}" if self.positions > 1 else f"one {unit}"
        return f"split: {visited}" + (f"; {counted(away, 'layer')} in host memory" if away else "")


class SplitLayers(Placement):
    """Groups of stages, or all GPUs as one group of one process."""

    name = "split"
    kinds = (Pipeline, OneProcess)
    without: ClassVar[Change] = {"train.verify_steps": 0, "zero.stage": None}

    def is_named(self, spec: RunSpec) -> bool:
        return spec.placement == self.name or spec.split != Split()

    def check(self, wanted: Wanted) -> None:
        spec, split, size = wanted.spec, wanted.spec.split, wanted.spec.gpus_per_group
        if size == 1 < wanted.total and spec.placement == self.name and split.schedule is None:
            raise SpecError(
                f"placement=split needs at least 2 {wanted.unit}s in a group, not gpus_per_group=1",
                ways=[*({"gpus_per_group": number} for number in divisors_of(wanted.total)[::-1]), OPEN],
            )
        if split != Split() and spec.placement not in (None, self.name):
            raise SpecError(
                f"split.* describes placement=split, not {spec.placement}",
                ways=[{"placement": self.name}, {"split.schedule": None, "split.offload_layers": None}],
            )
        if split.offload_layers and split.schedule == "1f1b":
            raise SpecError(
                "split.offload_layers goes with one process, not with 1f1b",
                ways=[{"split.schedule": "sequential"}, {"split.offload_layers": None}],
            )
        if wanted.device == "cpu":
            _check_without_gpus(split)

    def layouts(self, wanted: Wanted) -> Iterator[Layout]:
        refused: SpecError | None = None
        found: list[Layout] = []
        for kind, size in _grid(wanted):
            try:
                found.append(_laid(kind, size, wanted))
            except SpecError as error:
                refused = refused or error
        if not found:
            raise refused or wanted.too_few("placement=split")
        yield from found

    def last_resorts(self, wanted: Wanted) -> Iterator[Layout]:
        spec = wanted.spec
        if len(wanted.nodes) > 1 or spec.placement not in (None, self.name):
            return
        if spec.gpus_per_group not in (None, wanted.total):
            return
        if spec.split.schedule == "1f1b" or spec.split.offload_layers is not None:
            return
        try:
            yield _laid(OneProcess, wanted.total, wanted)
        except SpecError:
            return


def _check_without_gpus(split: Split) -> None:
    if split.schedule == "sequential":
        raise SpecError(
            "split.schedule=sequential is one process that visits GPU after GPU, and there is none here",
            ways=[{"split.schedule": "1f1b"}, {"split.schedule": None}, OPEN],
        )
    if split.offload_layers:
        raise SpecError(
            "split.offload_layers needs a GPU to copy layers to", ways=[{"split.offload_layers": None}, OPEN]
        )


def _grid(wanted: Wanted) -> Iterator[tuple[type[Layout], int]]:
    """Kinds and group sizes worth trying."""
    split, count = wanted.spec.split, wanted.total
    for size in wanted.sizes:
        if split.schedule == "1f1b" or (split.schedule is None and not split.offload_layers and size > 1):
            yield Pipeline, size
        single = split.schedule is None and (wanted.named or size == count > 1) and len(wanted.nodes) < 2
        if wanted.device == "cuda" and (split.schedule == "sequential" or single):
            yield OneProcess, size


def _laid(kind: type[Layout], size: int, wanted: Wanted) -> Layout:
    """A layout with its adapter's state. Raises SpecError where its groups or its state cannot be."""
    groups = wanted.groups_of(size)
    if kind is OneProcess and len(wanted.nodes) > 1:
        raise SpecError(
            f"split.schedule=sequential is one process, and the run is on {len(wanted.nodes)} nodes",
            ways=[{"split.schedule": None}, OPEN],
        )
    if kind is OneProcess and groups > 1:
        raise SpecError(
            f"split.schedule=sequential is one process over all {wanted.unit}s, not {groups} groups of {size}",
            ways=[{"gpus_per_group": wanted.total}, *([{"split.schedule": "1f1b"}] if size > 1 else []), OPEN],
        )
    if kind is Pipeline and size == 1:
        raise wanted.too_few("split.schedule=1f1b")
    layout = kind(groups=groups, gpus_per_group=size)
    _check_state(layout, wanted)
    return layout.with_state(wanted.spec)


def _check_state(layout: Layout, wanted: Wanted) -> None:
    """Only groups of stages can divide the adapter's state, and only up to its gradients."""
    spec, size = wanted.spec, layout.gpus_per_group
    offload, stage = spec.zero.offload == "cpu", spec.zero.stage
    if offload or stage == 3:
        what = "zero.offload=cpu" if offload else "zero.stage=3"
        plain: Change = {"zero.offload": "none"} if offload else {"zero.stage": None}
        raise SpecError(f"{what} does not go with a split backbone", ways=[_sharded(spec), plain, OPEN])
    if stage and layout.groups == 1:
        smaller = divisors_of(size)[:-1] if layout.stages > 1 else []
        raise SpecError(
            f"zero.stage={stage} divides the adapter's state among groups, and a split over "
            f"{counted(size, wanted.unit)} is one group",
            ways=[{"zero.stage": None}, *({"gpus_per_group": number} for number in smaller)],
        )


def _sharded(spec: RunSpec) -> Change:
    """Change to shards instead, without the settings that only a split has."""
    fixed = [name for name, value in msgspec.structs.asdict(spec.split).items() if value is not None]
    return {"placement": "shard", **{f"split.{name}": None for name in fixed}}


def _blocks(facts: ModelFacts) -> list[int]:
    """Number of layers of each block that no cut goes through, in order: 1, but for those that stay together."""
    count, first = facts.layer_count, facts.together_from
    return [1] * count if first is None else [1] * first + [count - first] * (first < count)


def _together(facts: ModelFacts) -> str:
    """'of which those from 15 on stay together, as they read keys and values of earlier ones'."""
    return f"of which those from {facts.together_from} on stay together, as they read keys and values of earlier ones"


def _layers_of_stages(stages: int, arrangement: Arrangement) -> tuple[int, ...]:
    """Layers of each stage, within every stage's memory if possible, otherwise as if memory sufficed."""
    facts, rooms = arrangement.sizes.facts, arrangement.rooms
    times, head = arrangement.times()
    extra = [0.0] * (stages - 1) + [head]
    blocks = _blocks(facts)
    starts = list(accumulate(blocks, initial=0))

    @cache
    def holds(stage: int, first: int, number: int) -> bool:
        own = facts.counts(starts[first], starts[first + number] - starts[first])
        return rooms is None or arrangement.required(stage, own) <= rooms[stage]

    if len(times) > 1 or len(blocks) < facts.layer_count:
        before = list(accumulate((times[run] for run in facts.run_of_layer), initial=0.0))
        each = [before[end] - before[start] for start, end in pairwise(starts)]
        found = pace(each, extra, holds) or pace(each, extra, lambda *_: True)
        assert found is not None
        ends = [starts[end] for end in accumulate(found, initial=0)]
        counts: tuple[int, ...] | None = tuple(end - start for start, end in pairwise(ends))
    else:
        layers = facts.layer_count
        extra[-1] /= times[0]
        most = [_most(partial(holds, stage, 0), layers) for stage in range(stages)]
        counts = balance(layers, most, extra) or balance(layers, [layers] * stages, extra)
    assert counts is not None
    return counts


def _most(holds: Callable[[int], bool], layers: int) -> int:
    """Layers that fit in a stage's memory, if all are alike."""
    return least(lambda count: not holds(count + 1), 0, layers)


def _spread(arrangement: Arrangement) -> tuple[int, ...]:
    """Layer map of one process: every GPU filled to the same share of its room."""
    sizes, rooms = arrangement.sizes, arrangement.rooms
    assert rooms is not None
    runs, run_of_layer = range(len(sizes.layers)), sizes.facts.run_of_layer

    def of_run(run: int, count: int) -> tuple[int, ...]:
        return tuple(count * (run == other) for other in runs)

    one, two = ([arrangement.held(1, of_run(run, count)) for run in runs] for count in (1, 2))
    each = [more - less for less, more in zip(one, two, strict=True)]
    layer_bytes = [each[run] for run in run_of_layer]
    for layer in arrangement.offloaded:
        layer_bytes[layer] -= sizes.layers[run_of_layer[layer]].packed
    useful = (
        room - max(arrangement.required(at, of_run(run, 1)) - each[run] for run in runs)
        for at, room in enumerate(rooms)
    )
    blocks = _blocks(sizes.facts)
    starts = list(accumulate(blocks, initial=0))
    block_bytes = [sum(layer_bytes[start:end]) for start, end in pairwise(starts)]
    placed = spread_layers(block_bytes, list(useful))
    return tuple(at for at, count in zip(placed, blocks, strict=True) for _ in range(count))


def _spans(plan: Plan) -> str:
    """'0-15, 16-31': the layers of each position."""
    numbered = groupby(range(len(plan.layer_map)), key=lambda layer: plan.layer_map[layer])
    return ", ".join(_span(list(layers)) for _, layers in numbered)


def _span(layers: list[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
