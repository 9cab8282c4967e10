"""Which candidate is best, and why did each of the others lose?"""

from collections.abc import Callable, Iterable, Sequence

from qdist.core.errors import Change, SpecError
from qdist.core.planning.candidates import USABLE_SHARE, Candidate, offloading, options
from qdist.core.planning.context import PlanningContext
from qdist.core.planning.placements.base import Layout
from qdist.core.planning.placements.registry import last_resorts, simplicity
from qdist.core.planning.plan import Alternative
from qdist.core.spec.contradictions import largest_divisor
from qdist.core.text import counted, format_bytes

TIE = 0.02
"""Difference in speed that no prediction can tell: the simpler layout wins, then one with room for the optimizer's
moments, then one whose state is whole on each rank, then the one that needs less memory."""


def check_batches(setting: PlanningContext, layout: Layout) -> None:
    """Raises SpecError when the batch cannot be spread over a layout."""
    spec, ranks = setting.spec, layout.data_parallel
    noun = "group" if layout.stages > 1 else "rank"
    size = spec.micro_batch or 1
    if spec.batch % ranks:
        raise SpecError(
            f"global_batch={spec.batch} cannot be spread over {counted(ranks, noun)}",
            ways=[_rounded(spec.batch, ranks * size), *_fewer(setting, layout)],
        )
    if setting.packs(layout):
        return
    each = spec.batch // ranks
    if each % size:
        raise SpecError(
            f"{counted(ranks, noun)} x micro_batch={size} does not divide global_batch={spec.batch}",
            ways=[
                {"micro_batch": largest_divisor(each, size)},
                {"micro_batch": None},
                _rounded(spec.batch, ranks * size),
            ],
        )
    stages = layout.stages
    if each // size < stages:
        smaller = [{"micro_batch": largest_divisor(each, each // stages)}] if each >= stages else []
        raise SpecError(
            f"{stages} stages need at least {stages} micro-batches a step; global_batch={spec.batch} has "
            f"{each // size} of {size} for each group",
            ways=[*smaller, {"global_batch": stages * ranks * size}, *_fewer(setting, layout)],
        )


def _rounded(batch: int, multiple: int) -> Change:
    return {"global_batch": -(-batch // multiple) * multiple}


def _fewer(setting: PlanningContext, layout: Layout) -> list[Change]:
    """Changes to fewer GPUs, on several nodes of each, that keep the batch as it is."""
    batch, nodes = setting.spec.batch, len(setting.nodes) or 1
    count = min(setting.nodes, default=layout.groups * layout.gpus_per_group)
    dividing = [number for number in range(count - 1, 0, -1) if batch % (number * nodes) == 0]
    return [{"gpus": number} for number in dividing[:2]]


def contenders(setting: PlanningContext, found: Sequence[Layout]) -> list[list[Candidate]]:
    """The candidates of each layout whose batch arithmetic works out, whether or not its ranks are `unable`.

    Raises SpecError where no layout can, or the batch does not work out for the simplest that can: it was asked for.
    """
    simplest = next((layout for layout in found if not barring(setting, layout)), found[0])
    if refused := barring(setting, simplest):
        raise refused
    check_batches(setting, simplest)
    return [
        [own for divided in layout.state_ways(setting.spec) for own in options(setting, divided)]
        for layout in found
        if _works(setting, layout)
    ]


def barring(setting: PlanningContext, layout: Layout) -> SpecError | None:
    """Why a layout cannot exist, or its ranks cannot do what is wanted; None if it can."""
    spec = setting.spec
    return layout.impossible(spec, setting.sizes.facts) or layout.unable(spec, setting.new_rows)


def eligible(setting: PlanningContext, rows: Iterable[Iterable[Candidate]]) -> list[Candidate]:
    """The candidates whose ranks support everything the spec asks for."""
    return [own for row in rows for own in row if not own.layout.unable(setting.spec, setting.new_rows)]


def choose(candidates: Iterable[Candidate]) -> Candidate | None:
    """The fastest that fits; if speed is unknown, the first: the simplest layout with the largest micro-batch.

    On nodes of unknown speed it is the way of keeping the adapter's state for which a step waits least.
    """
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        return None
    if not (first := fitting[0]).seconds:
        alike = (own for own in fitting if _without_state(own) == _without_state(first))
        return min(alike, key=lambda own: own.network_s)
    fastest = min(candidate.seconds for candidate in fitting)
    tied = [candidate for candidate in fitting if candidate.seconds * (1 - TIE) <= fastest]
    return min(tied, key=lambda own: (simplicity(own.layout), own.paged, own.layout.zero_stage, own.required_bytes))


def _without_state(own: Candidate) -> tuple[object, ...]:
    layout = own.layout
    return type(layout), layout.groups, layout.gpus_per_group, own.micro_batch, own.packed, own.checkpointed


def last_resort(setting: PlanningContext, count: int) -> Candidate | None:
    """The candidate with offloaded layers, if nothing else fits and nothing forbids it."""
    return choose(_offloading(setting, count))


def host_memory_wanted(setting: PlanningContext, count: int) -> tuple[int, int] | None:
    """(layers, bytes) to offload to host memory if there were enough of it; None if that cannot help."""
    sizes = setting.sizes
    boundless = setting._replace(host_bytes=2 * sizes.widest_layer * sizes.facts.layer_count)
    away = min((own.offloaded for own in _offloading(boundless, count) if own.fits), key=len, default=())
    return (len(away), sizes.held_by(away)) if away else None


def _offloading(setting: PlanningContext, count: int) -> list[Candidate]:
    """Candidates with layers offloaded to host memory; none if the user decided otherwise."""
    found = last_resorts(setting.spec, count, nodes=setting.nodes) if setting.rooms is not None else []
    able = (layout for layout in found if _works(setting, layout) and not layout.unable(setting.spec, setting.new_rows))
    return [own for layout in able for own in offloading(setting, layout)]


def closest(candidates: Iterable[Candidate]) -> Candidate:
    """The candidate with the smallest shortfall, of those that do not fit."""
    return min(candidates, key=lambda candidate: (candidate.missing, simplicity(candidate.layout)))


def barred(setting: PlanningContext, winner: Candidate, rows: Iterable[Sequence[Candidate]]) -> SpecError | None:
    """Why a layout that would have won cannot do what is wanted; None if there is no such layout."""
    for row in rows:
        best = choose(row)
        if best is None or best.seconds > winner.seconds:
            continue
        if refused := best.layout.unable(setting.spec, setting.new_rows):
            return refused
    return None


def alternatives(
    setting: PlanningContext,
    winner: Candidate,
    rows: Sequence[Sequence[Candidate]],
    tokens_s: Callable[[Candidate], float],
) -> tuple[Alternative, ...]:
    """The best candidate of every other layout, and why it lost, in words."""
    lost = []
    for row in rows:
        if winner in row:
            continue
        best = choose(row)
        own = best or closest(row)
        refused = own.layout.unable(setting.spec, setting.new_rows)
        lost.append(
            Alternative(
                placement=own.layout.placement,
                schedule=own.layout.schedule,
                groups=own.layout.groups,
                gpus_per_group=own.layout.gpus_per_group,
                micro_batch=own.micro_batch,
                checkpointed_layers=own.checkpointed,
                tokens_per_second=tokens_s(own) if best else 0.0,
                required_bytes=own.required_bytes,
                engine=own.layout.engine,
                zero_stage=own.layout.zero_stage,
                reason=shortage(own) if not best else refused.message if refused else _lost(setting, own, winner),
            )
        )
    return tuple(lost)


def nonexistent(setting: PlanningContext, found: Iterable[Layout]) -> tuple[Alternative, ...]:
    """Layouts that the model has too few layers for, or that would cut it where it cannot be cut."""
    refused = ((layout, layout.impossible(setting.spec, setting.sizes.facts)) for layout in found)
    return tuple(
        Alternative(
            placement=layout.placement,
            schedule=layout.schedule,
            groups=layout.groups,
            gpus_per_group=layout.gpus_per_group,
            micro_batch=0,
            checkpointed_layers=0,
            tokens_per_second=0.0,
            required_bytes=0,
            engine=layout.engine,
            zero_stage=layout.zero_stage,
            reason=error.message,
        )
        for layout, error in refused
        if error
    )


def shortage(candidate: Candidate) -> str:
    """'needs 31.2 GiB on every GPU, 9.6 GiB more than 95 % of 24.0 GiB'."""
    missing, at = candidate.missing
    assert candidate.rooms is not None
    where = "every GPU" if len(candidate.rooms) == 1 else f"GPU {at} of each group"
    where = f"GPU {at}" if len(candidate.rooms) > 1 and candidate.layout.groups == 1 else where
    room = candidate.rooms[at]
    return (
        f"needs {format_bytes(candidate.needs[at])} on {where}, {format_bytes(missing)} more than "
        f"{USABLE_SHARE * 100:.0f} % of {format_bytes(room / USABLE_SHARE)}"
    )


def _lost(setting: PlanningContext, own: Candidate, winner: Candidate) -> str:
    """Why a candidate that fits was not chosen."""
    if setting.world(winner.layout).spanning or not setting.world(own.layout).spanning:
        return _slower(own, winner)
    how = f"predicted {winner.seconds / own.seconds:.1f} times as fast" if own.seconds < winner.seconds else ""
    if not how and own.seconds:
        how = f"{1 - winner.seconds / own.seconds:.0%} slower".replace("%", " %")
    size = own.layout.gpus_per_group
    named = f"--placement {own.layout.placement} --gpus-per-group {size} asks for it"
    return f"groups of {size} span nodes, and others fit{f'; {how}' if how else ''}; {named}"


def _slower(own: Candidate, winner: Candidate) -> str:
    if not own.seconds:
        return "not known to be faster, and less simple"
    ratio = 1 - winner.seconds / own.seconds
    if ratio < TIE:
        if simplicity(own.layout) > simplicity(winner.layout):
            return "no faster, and less simple"
        if own.paged > winner.paged:
            return "no faster, and has no room for the optimizer's moments"
        return f"no faster, and needs {format_bytes(own.required_bytes)} where {format_bytes(winner.required_bytes)} do"
    return f"{ratio:.0%} slower: {_why_slower(own, winner)}".replace("%", " %")


def _why_slower(own: Candidate, winner: Candidate) -> str:
    if own.network_s - winner.network_s > (own.seconds - winner.seconds) / 2:
        return f"the network adds {own.network_s:.2g} s a step where it adds {winner.network_s:.2g} s"
    if why := own.layout.why_slower(winner.layout, own.micro_batches):
        return why
    if own.checkpointed > winner.checkpointed:
        return f"recomputes {own.checkpointed} layers where {winner.checkpointed} do"
    if own.micro_batch < winner.micro_batch:
        return f"micro-batches of {own.micro_batch} where {winner.micro_batch} have room"
    if own.paged > winner.paged:
        return "has no room for the optimizer's moments"
    return own.layout.overhead


def _works(setting: PlanningContext, layout: Layout) -> bool:
    try:
        check_batches(setting, layout)
    except SpecError:
        return False
    return layout.impossible(setting.spec, setting.sizes.facts) is None
