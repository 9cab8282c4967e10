"""What a placement promises the planner: its layouts and refusals, its share of memory and time, and its words.

A placement is one module here, and one module or folder in `qdist.runtime.placements`; nobody else asks which one a
layout has. tests/core/planning/test_placements.py runs all of them through these promises.
"""

from collections.abc import Iterator, Sequence
from math import gcd
from typing import ClassVar, Literal, NamedTuple, Protocol

import msgspec

from qdist.core.errors import Change, SpecError
from qdist.core.machine.world import World, used_gpus, world_of
from qdist.core.model.shapes import ModelFacts
from qdist.core.planning.memory import Share, Sizes
from qdist.core.planning.plan import Plan
from qdist.core.spec.run_spec import RunSpec
from qdist.core.spec.sections import Placement as Name
from qdist.core.spec.sections import Schedule
from qdist.core.text import counted

OPEN: Change = {"placement": None, "gpus_per_group": None, "split.schedule": None, "split.offload_layers": None}
"""Change that leaves the layout to the planner."""
MOST_SPANNING = 64
"""Largest groups over several nodes that are tried unless a size is named."""
_FEW = 6
"""Nodes up to which the GPUs of each are told."""
_UNITS = {"cuda": "GPU", "cpu": "CPU rank"}


class Wanted(NamedTuple):
    """A spec and a number of GPUs or CPU ranks, for which a placement offers layouts."""

    spec: RunSpec
    total: int
    device: Literal["cuda", "cpu"]
    named: bool = False
    """Whether the spec asks for this placement and no other."""
    nodes: tuple[int, ...] = ()
    """GPUs or CPU ranks of each node; empty for one machine, which has them all."""

    @property
    def unit(self) -> str:
        """'GPU' or 'CPU rank'."""
        return _UNITS[self.device]

    @property
    def sizes(self) -> list[int]:
        """GPUs per group worth trying if a group shares a backbone."""
        if self.spec.gpus_per_group:
            return [self.spec.gpus_per_group]
        if len(self.nodes) > 1:
            return self._sizes_over_nodes()
        return [self.total] if self.named else divisors_of(self.total)

    def _sizes_over_nodes(self) -> list[int]:
        """Those that divide every node, those that leave GPUs of some node idle, and those that span nodes."""
        evenly, least = divisors_of(gcd(*self.nodes)), min(self.nodes)
        of_some = {size for count in set(self.nodes) for size in divisors_of(count) if size <= least}
        within = evenly[-1:] if self.named and evenly else sorted(of_some)
        spanning = [size for size in divisors_of(self.total) if size <= MOST_SPANNING and size not in of_some]
        return [*within, *spanning]

    def groups_of(self, size: int) -> int:
        """Groups of a size, within nodes where it goes into them."""
        within = sum(count // size for count in self.nodes) if self.nodes and size <= min(self.nodes) else 0
        return within or self.total // size

    def too_few(self, what: str) -> SpecError:
        """The error for groups of one."""
        larger: list[Change] = [{"gpus_per_group": size} for size in divisors_of(self.total)[::-1]]
        ways = [*(larger or [{"gpus": 2}]), OPEN]
        return SpecError(f"{what} needs at least 2 {self.unit}s in a group", ways=ways)


def divisors_of(count: int) -> list[int]:
    """Group sizes above 1 into which `count` GPUs divide evenly."""
    return [number for number in range(2, count + 1) if count % number == 0]


class Arrangement(Protocol):
    """Inputs of a layer map: memory and time of layers, for one micro-batch, at the positions of a group."""

    sizes: Sizes
    offloaded: tuple[int, ...]
    """Layers whose packed weights are offloaded to host memory."""

    @property
    def rooms(self) -> tuple[int, ...] | None:
        """Bytes of room for the plan at each position; None for CPU ranks."""

    def required(self, position: int, counts: tuple[int, ...]) -> int:
        """Bytes required at a position for these counts of layers by run, loading included."""

    def held(self, position: int, counts: tuple[int, ...]) -> int:
        """The same during training, with no layer offloaded."""

    def times(self) -> tuple[list[float], float]:
        """Cost per micro-batch of a layer of each run, and of the head: seconds, or weights."""


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A grid of `groups` x `gpus_per_group`, and who keeps the adapter's state.

    Each placement has a subclass for each of its kinds. The promises are kept here as by ranks that all compute with
    the whole backbone.
    """

    placement: ClassVar[Name]
    schedule: ClassVar[Schedule | None] = None
    packs: ClassVar[bool] = True
    """Whether its ranks can compute micro-batches of packed samples."""
    groups: int
    gpus_per_group: int
    zero_stage: int = 0
    engine: Literal["torch", "deepspeed"] = "torch"

    @property
    def world_size(self) -> int:
        """Number of processes of the run."""
        return self.groups * self.gpus_per_group

    @property
    def positions(self) -> int:
        """GPUs of a group that hold different layers; 1 if all GPUs hold the same."""
        return 1

    @property
    def stages(self) -> int:
        """Ranks that pass a micro-batch on from one to the next; keeping all busy takes as many micro-batches."""
        return 1

    @property
    def data_parallel(self) -> int:
        """Micro-batches computed at a time on different samples; ZeRO partitions among this many ranks."""
        return self.world_size // self.stages

    def world_on(self, gpus: Sequence[int] = ()) -> World:
        """Its ranks on their GPUs. gpus: of each node; empty for one machine."""
        nodes = used_gpus(self.groups, self.gpus_per_group, gpus) if len(gpus) > 1 else ()
        return world_of(self.groups, self.gpus_per_group, size=self.world_size, nodes=nodes)

    @property
    def one_communicator(self) -> bool:
        """Whether all exchanges are among all ranks, by torch: DeepSpeed and groups have their own."""
        return self.engine == "torch" and 1 in (self.groups, self.gpus_per_group)

    def neighbours(self, position: int) -> int:
        """Number of stages that a position exchanges data with."""
        return (0 < position < self.stages) + (position < self.stages - 1)

    def with_state(self, spec: RunSpec) -> "Layout":
        """The layout with ZeRO's stage and engine: 2 if the adapter's state can be partitioned, torch if nothing is."""
        stage, offload, many = spec.zero.stage, spec.zero.offload == "cpu", self.data_parallel > 1
        if stage is None:
            whole = spec.optim.name == "adamw-8bit" or spec.optim.reduce_dtype != "float32"
            stage = 2 if (many or offload) and not whole else 0
        # Stages of several groups are DeepSpeed's whatever the stage; elsewhere torch adds up undivided gradients.
        divides = stage or offload or (many and self.stages > 1)
        return msgspec.structs.replace(self, zero_stage=stage, engine="deepspeed" if divides else "torch")

    def state_ways(self, spec: RunSpec) -> tuple["Layout", ...]:
        """The layout, and if the user leaves it open, the same with the adapter's state whole on every rank."""
        if spec.zero.stage is not None or spec.zero.offload == "cpu" or not self.zero_stage:
            return (self,)
        return self, msgspec.structs.replace(self, zero_stage=0, engine="torch")

    def impossible(self, spec: RunSpec, facts: ModelFacts) -> SpecError | None:
        """Why this layout is impossible for a model with such layers, or None."""
        if self.engine == "torch" or spec.optim.reduce_dtype == "float32":
            return None
        return SpecError(
            f"optim.reduce_dtype={spec.optim.reduce_dtype} is for gradients that torch adds up, and those of "
            f"{self.groups} groups of stages are DeepSpeed's",
            ways=[{"optim.reduce_dtype": "float32"}, OPEN],
        )

    def nothing_crosses(self, spec: RunSpec) -> SpecError | None:
        """The error for an asked way of adding gradients up where no other rank has any; None if that is so."""
        if self.data_parallel > 1 or spec.optim.reduce_dtype == "float32":
            return None
        return SpecError(
            f"optim.reduce_dtype={spec.optim.reduce_dtype} is for gradients that cross between ranks, and here is one "
            "rank, or one group of stages, that has them all",
            ways=[{"optim.reduce_dtype": "float32"}, {"gpus": 2}],
        )

    def unable(self, spec: RunSpec, new_rows: int) -> SpecError | None:
        """The error for what the run wants but the ranks cannot do, or None. new_rows: vocabulary rows to train."""
        return None

    def unmapped(self) -> SpecError | None:
        """Why a `device_map` of transformers cannot express this layout, or None."""
        return None

    def layer_map(self, arrangement: Arrangement) -> tuple[int, ...]:
        """Position of each layer, never decreasing; empty if all positions hold the same."""
        return ()

    def share(self, own: Share, position: int) -> Share:
        """Share of a position: what it holds and computes of its layers. own: as if it were alone."""
        return own

    def why_slower(self, winner: "Layout", micro_batches: int) -> str:
        """What makes it slower than the winner; empty if they differ only in degree."""
        return ""

    @property
    def overhead(self) -> str:
        """What else makes it slower than another layout of its kind."""
        return "each step does more beside the layers"

    @property
    def gpus_in_words(self) -> str:
        """'4 GPUs'."""
        return counted(self.groups * self.gpus_per_group, "GPU")

    def in_words(self, plan: Plan) -> str:
        """The placement of a plan, its numbers and what they mean."""
        raise NotImplementedError

    def batch_in_words(self, plan: Plan) -> str:
        """How the global batch of a plan is split: '4 ranks x 2 x 8 samples'."""
        if plan.packed:
            return f"{counted(self.world_size, 'rank')} x {rows_in_words(plan)}"
        samples = counted(plan.micro_batch, "sample")
        return f"{counted(self.world_size, 'rank')} x {plan.gradient_accumulation} x {samples}"


def rows_in_words(plan: Plan) -> str:
    """The packed micro-batches of a rank and step: '1.5 packed rows of 2,048 positions, samples'."""
    number = plan.fill.micro_batches if plan.fill else plan.gradient_accumulation
    rows = f"{number:.3g} packed row{'' if number == 1 else 's'}"
    return f"{rows} of {plan.micro_batch * plan.seq_len:,} positions, samples"


def groups_in_words(plan: Plan) -> str:
    """'2 groups of 4', 'the 4 GPUs'."""
    size = plan.gpus_per_group
    return f"{plan.groups} groups of {size}" if plan.groups > 1 else f"the {size} {unit_of(plan)}s"


def nodes_in_words(plan: Plan) -> str:
    """'2 nodes x 4 GPUs', '3 nodes of 8, 6 and 6 GPUs', of what the run uses."""
    used, unit = plan.world.ranks_of_nodes, unit_of(plan)
    each = sorted(set(used), reverse=True)
    if len(each) == 1:
        return f"{len(used)} nodes x {counted(each[0], unit)}"
    several = f"{', '.join(map(str, used[:-1]))} and {used[-1]}" if len(used) <= _FEW else f"{each[-1]} to {each[0]}"
    return f"{len(used)} nodes of {several} {unit}s"


def unit_of(plan: Plan) -> str:
    """'GPU' or 'rank'."""
    return "GPU" if plan.device == "cuda" else "rank"


class Placement(Protocol):
    """One way of placing a backbone on the GPUs of a group."""

    name: Name
    kinds: tuple[type[Layout], ...]
    """Classes of its layouts, the simplest first."""
    without: ClassVar[Change] = {}
    """Settings that only other placements support, with values that turn them off."""

    def is_named(self, spec: RunSpec) -> bool:
        """Whether the spec asks for this placement, by name or by settings that only it has."""
        return spec.placement == self.name

    def check(self, wanted: Wanted) -> None:
        """Raises SpecError where settings contradict this placement, so that no setting is ignored."""
        return

    def layouts(self, wanted: Wanted) -> Iterator[Layout]:
        """Layouts worth trying, with `gpus_per_group` a divisor of the GPU count.

        Raises SpecError where there is none although it was asked for.
        """

    def last_resorts(self, wanted: Wanted) -> Iterator[Layout]:
        """Layouts that offload layers to host memory, if the user left that open."""
        yield from ()
