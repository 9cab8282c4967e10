"""Which placements are there, and which layouts do they offer for a spec and a number of GPUs?"""

from typing import Literal

from qdist.core.errors import SpecError
from qdist.core.planning.placements.base import Layout, Placement, Wanted
from qdist.core.planning.placements.replicate import Replicate
from qdist.core.planning.placements.shard import Shard
from qdist.core.planning.placements.split import SplitLayers
from qdist.core.planning.plan import Plan
from qdist.core.spec.run_spec import RunSpec
from qdist.core.text import counted

PLACEMENTS: tuple[Placement, ...] = (Replicate(), Shard(), SplitLayers())
"""Placements in order of simplicity: of two equally fast ones, the earlier wins."""
_KINDS = [kind for placement in PLACEMENTS for kind in placement.kinds]


def layouts(
    spec: RunSpec, count: int, *, device: Literal["cuda", "cpu"], nodes: tuple[int, ...] = ()
) -> tuple[Layout, ...]:
    """Every layout of `count` GPUs or CPU ranks that the spec allows, the simplest first.

    nodes: how many of them each node has; empty for one machine.
    CPU ranks share their memory: nothing is gained by spreading a backbone, unless one asks for it.

    Raises SpecError where settings contradict each other or the number of GPUs.
    """
    wanted = Wanted(spec, count, device, nodes=nodes)
    _check_size(wanted)
    for placement in PLACEMENTS:
        placement.check(wanted)
    named = [placement for placement in PLACEMENTS if placement.is_named(spec)]
    usual = PLACEMENTS[:1] if device == "cpu" and spec.gpus_per_group in (None, 1) else PLACEMENTS
    found: list[Layout] = []
    refused: SpecError | None = None
    for placement in named or usual:
        try:
            found += placement.layouts(wanted._replace(named=bool(named)))
        except SpecError as error:
            refused = refused or error
    if refused and not found:
        raise refused
    return tuple(sorted(found, key=simplicity))


def last_resorts(spec: RunSpec, count: int, *, nodes: tuple[int, ...] = ()) -> list[Layout]:
    """Layouts of GPUs that offload layers to host memory, if the user left that open."""
    wanted = Wanted(spec, count, "cuda", nodes=nodes)
    return [layout for placement in PLACEMENTS for layout in placement.last_resorts(wanted)]


def simplicity(layout: Layout) -> int:
    """Sort key of a layout: smaller is simpler."""
    return _KINDS.index(type(layout))


def layout_of(plan: Plan) -> Layout:
    """The layout of a plan."""
    kind = next(own for own in _KINDS if (own.placement, own.schedule) == (plan.placement, plan.schedule))
    return kind(groups=plan.groups, gpus_per_group=plan.gpus_per_group, zero_stage=plan.zero_stage, engine=plan.engine)


def _check_size(wanted: Wanted) -> None:
    size, count = wanted.spec.gpus_per_group, wanted.total
    if size is None or (size <= count and count % size == 0) or size <= min(wanted.nodes, default=0):
        return
    smaller = next(number for number in range(min(size, count), 0, -1) if count % number == 0)
    raise SpecError(
        f"gpus_per_group={size}, but {counted(count, wanted.unit)} cannot be divided so",
        ways=[{"gpus_per_group": smaller}, {"gpus_per_group": None}, {"gpus": size}],
    )
