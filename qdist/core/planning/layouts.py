"""Which ways are there to lay a backbone on so many GPUs, given what the user fixed?"""

from collections.abc import Iterator
from typing import Literal

import msgspec

from qdist.core.errors import Change, SpecError
from qdist.core.planning.plan import Placement, Schedule
from qdist.core.spec.spec import RunSpec, Split
from qdist.core.text import counted

OPEN: Change = {"placement": None, "gpus_per_group": None, "split.schedule": None, "split.offload_layers": None}
"""The layout left to the planner."""
_UNITS = {"cuda": "GPU", "cpu": "CPU rank"}


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A grid of `groups` x `gpus_per_group`, and who keeps the adapter's state."""

    placement: Placement
    schedule: Schedule | None = None
    groups: int
    gpus_per_group: int
    zero_stage: int
    engine: Literal["torch", "deepspeed"]

    @property
    def world_size(self) -> int:
        """Processes: one that visits GPU after GPU counts once."""
        return 1 if self.schedule == "sequential" else self.groups * self.gpus_per_group

    @property
    def data_parallel(self) -> int:
        """Micro-batches that are computed at a time on different samples; ZeRO divides among as many."""
        return self.groups if self.placement == "split" else self.world_size

    @property
    def one_communicator(self) -> bool:
        """Whether all exchanges are among all ranks, by torch: DeepSpeed and groups have their own."""
        return self.engine == "torch" and (self.placement == "replicate" or self.groups == 1)

    @property
    def simplicity(self) -> int:
        """Smaller is simpler."""
        return ("replicate", "shard", "split").index(self.placement) + (self.schedule == "sequential")


def layouts(spec: RunSpec, count: int, *, device: Literal["cuda", "cpu"]) -> tuple[Layout, ...]:
    """Every layout of `count` GPUs or CPU ranks that the spec allows, the simplest first.

    CPU ranks share their memory: nothing is gained by spreading a backbone, unless one asks for it.

    Raises SpecError where settings contradict each other or the number of GPUs.
    """
    _check(spec, count, device)
    found: list[Layout] = []
    refused: SpecError | None = None
    for placement, schedule, size in _grid(spec, count, device):
        try:
            found.append(_layout(spec, placement, schedule, count, size, _UNITS[device]))
        except SpecError as error:
            refused = refused or error
    if not found:
        # Nothing was worth a try: whole layers on each of one CPU rank.
        raise refused or _too_few(f"placement={spec.placement or 'split'}", count, _UNITS[device])
    return tuple(sorted(found, key=lambda layout: layout.simplicity))


def _grid(
    spec: RunSpec, count: int, device: Literal["cuda", "cpu"]
) -> Iterator[tuple[Placement, Schedule | None, int]]:
    """(placement, schedule, GPUs a group) of all that is worth a try."""
    split, size = spec.split, spec.gpus_per_group
    named = spec.placement or ("split" if split != Split() else None)
    if not named and device == "cpu" and size in (None, 1):
        named = "replicate"
    if named in (None, "replicate") and size in (None, 1):
        yield "replicate", None, 1
    divisors = divisors_of(count)
    for each in [size] if size else [count] if named else divisors:
        if named == "shard" or (not named and each > 1):
            yield "shard", None, each
        if named in (None, "split"):
            if split.schedule == "1f1b" or (split.schedule is None and not split.offload_layers and each > 1):
                yield "split", "1f1b", each
            single = split.schedule is None and (named or each == count > 1)
            if device == "cuda" and (split.schedule == "sequential" or single):
                yield "split", "sequential", each


def divisors_of(count: int) -> list[int]:
    """Sizes above 1 of groups into which so many GPUs can be divided."""
    return [number for number in range(2, count + 1) if count % number == 0]


def impossible(spec: RunSpec, layout: Layout, layers: int) -> SpecError | None:
    """Why a layout cannot exist for a model of so many layers, or None: a stage has at least one."""
    stages = layout.gpus_per_group
    if layout.schedule != "1f1b" or stages <= layers:
        return None
    count = layout.groups * stages
    smaller = [size for size in divisors_of(count) if size <= layers]
    return SpecError(
        f"{stages} stages need at least as many layers, and {spec.model} has {counted(layers, 'layer')}",
        ways=[
            *({"gpus_per_group": size} for size in smaller[-1:]),
            *({"gpus": number} for number in (layers,) if number > 1),
            OPEN,
        ],
    )


def unable(spec: RunSpec, layout: Layout, new_rows: int) -> SpecError | None:
    """What the run wants that the ranks of a layout cannot do, or None. A stage has no whole model.

    new_rows: of the vocabulary, to be trained.
    """
    if layout.schedule != "1f1b":
        return None
    if new_rows:
        rows = "a new row" if new_rows == 1 else f"{new_rows} new rows"
        return SpecError(
            f"the stages of a 1f1b split cannot train {rows} of the vocabulary",
            ways=[_sharded(spec), OPEN],
        )
    if spec.train.answers:
        return SpecError(
            f"the stages of a 1f1b split cannot generate the answers of train.answers={spec.train.answers}",
            ways=[{"train.answers": 0}, _sharded(spec)],
        )
    return None


def one_process(spec: RunSpec, count: int) -> Layout:
    """One process over all GPUs: the only form that can leave layers in host memory."""
    return _layout(spec, "split", "sequential", count, count, "GPU")


def _layout(spec: RunSpec, placement: Placement, schedule: Schedule | None, count: int, size: int, unit: str) -> Layout:
    groups = count // size
    if schedule == "sequential" and groups > 1:
        raise SpecError(
            f"split.schedule=sequential is one process over all {unit}s, not {groups} groups of {size}",
            ways=[{"gpus_per_group": count}, *([{"split.schedule": "1f1b"}] if size > 1 else []), OPEN],
        )
    if size == 1 and (placement == "shard" or schedule == "1f1b"):
        raise _too_few("placement=shard" if placement == "shard" else "split.schedule=1f1b", count, unit)
    shape = Layout(
        placement=placement, schedule=schedule, groups=groups, gpus_per_group=size, zero_stage=0, engine="torch"
    )
    return msgspec.structs.replace(shape, **_state(spec, shape, unit))


def _too_few(what: str, count: int, unit: str) -> SpecError:
    larger: list[Change] = [{"gpus_per_group": size} for size in divisors_of(count)[::-1]]
    return SpecError(f"{what} needs at least 2 {unit}s in a group", ways=[*(larger or [{"gpus": 2}]), OPEN])


def _sharded(spec: RunSpec) -> Change:
    """Shards instead, without what only a split has."""
    fixed = [name for name, value in msgspec.structs.asdict(spec.split).items() if value is not None]
    return {"placement": "shard", **{f"split.{name}": None for name in fixed}}


def divisions(spec: RunSpec, layout: Layout) -> tuple[Layout, ...]:
    """The layout, and the same with the adapter's state whole on every rank, where the user leaves that open."""
    if spec.zero.stage is not None or _offloads(spec) or layout.placement == "split" or not layout.zero_stage:
        return (layout,)
    return layout, msgspec.structs.replace(layout, zero_stage=0, engine="torch")


def _offloads(spec: RunSpec) -> bool:
    return spec.zero.offload == "cpu"


def _state(spec: RunSpec, shape: Layout, unit: str) -> dict[str, object]:
    """ZeRO's stage and the engine: 2 wherever the adapter's state can be divided, torch where nothing is divided."""
    stage, offload = spec.zero.stage, _offloads(spec)
    if shape.placement == "split":
        if offload or stage == 3:
            what = "zero.offload=cpu" if offload else "zero.stage=3"
            plain: Change = {"zero.offload": "none"} if offload else {"zero.stage": None}
            raise SpecError(f"{what} does not go with a split backbone", ways=[_sharded(spec), plain, OPEN])
        if stage and shape.groups == 1:
            count = shape.gpus_per_group
            smaller = divisors_of(count)[:-1] if shape.schedule == "1f1b" else []
            raise SpecError(
                f"zero.stage={stage} divides the adapter's state among groups, and a split over "
                f"{counted(count, unit)} is one group",
                ways=[{"zero.stage": None}, *({"gpus_per_group": size} for size in smaller)],
            )
    many = shape.data_parallel > 1
    if stage is None:
        stage = 2 if many or offload else 0
    # Stages of several groups are DeepSpeed's whatever the stage; elsewhere torch adds up undivided gradients.
    divides = stage or offload or (many and shape.placement == "split")
    return {"zero_stage": stage, "engine": "deepspeed" if divides else "torch"}


def _check(spec: RunSpec, count: int, device: Literal["cuda", "cpu"]) -> None:
    """Refuse what contradicts itself, so that no setting is ignored."""
    size, unit = spec.gpus_per_group, _UNITS[device]
    if size is not None and (size > count or count % size):
        smaller = next(n for n in range(min(size, count), 0, -1) if count % n == 0)
        raise SpecError(
            f"gpus_per_group={size}, but {counted(count, unit)} cannot be divided so",
            ways=[{"gpus_per_group": smaller}, {"gpus_per_group": None}, {"gpus": size}],
        )
    if size == 1 < count and spec.placement == "split" and spec.split.schedule is None:
        raise SpecError(
            f"placement=split needs at least 2 {unit}s in a group, not gpus_per_group=1",
            ways=[*({"gpus_per_group": number} for number in divisors_of(count)[::-1]), OPEN],
        )
    if spec.placement == "replicate" and size not in (None, 1):
        raise SpecError(
            f"gpus_per_group={size}, but placement=replicate puts the whole backbone on each {unit}",
            ways=[{"placement": "shard"}, {"gpus_per_group": None}],
        )
    if spec.split != Split() and spec.placement not in (None, "split"):
        raise SpecError(
            f"split.* describes placement=split, not {spec.placement}",
            ways=[{"placement": "split"}, {"split.schedule": None, "split.offload_layers": None}],
        )
    if spec.split.offload_layers and spec.split.schedule == "1f1b":
        raise SpecError(
            "split.offload_layers goes with one process, not with 1f1b",
            ways=[{"split.schedule": "sequential"}, {"split.offload_layers": None}],
        )
    if spec.split.schedule == "sequential" and device == "cpu":
        raise SpecError(
            "split.schedule=sequential is one process that visits GPU after GPU, and there is none here",
            ways=[{"split.schedule": "1f1b"}, {"split.schedule": None}, OPEN],
        )
    if spec.split.offload_layers and device == "cpu":
        raise SpecError(
            "split.offload_layers needs a GPU to copy layers to", ways=[{"split.offload_layers": None}, OPEN]
        )
