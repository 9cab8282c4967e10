"""What does a run that does not fit lack, which changes make it fit, and what was decided for the user, and why?"""

from collections.abc import Iterator
from itertools import product
from math import ceil

from qdist.core.errors import Change, SpecError
from qdist.core.machine.calibration import Correction
from qdist.core.machine.cards import has_bfloat16
from qdist.core.machine.cluster import Cluster
from qdist.core.machine.world import Node
from qdist.core.model.shapes import ModelFacts
from qdist.core.planning.activations import Recurrence
from qdist.core.planning.candidates import USABLE_SHARE, Candidate
from qdist.core.planning.context import PlanningContext
from qdist.core.planning.fill import WORTH
from qdist.core.planning.memory import UNMEASURED_SHARE, MemoryBudget, Sizes
from qdist.core.planning.placements.base import OPEN, Placement, unit_of
from qdist.core.planning.placements.registry import PLACEMENTS
from qdist.core.planning.plan import Plan
from qdist.core.planning.ranking import shortage
from qdist.core.spec.run_spec import RunSpec, flatten
from qdist.core.spec.sections import Optim
from qdist.core.spec.suggest import TooBigError
from qdist.core.text import GIB, counted, format_bytes

_MORE_GPUS = (2, 4, 8, 16, 32, 64)
_LARGER_GIB = (8, 11, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180, 192)
_BOTH = tuple(product((8, 64), (24, 80, 192)))
"""(GPUs, GiB of each) to suggest if neither more nor larger GPUs alone are enough."""
_SHORT, _SMALL = 512, 64
"""Sequence length in tokens and adapter rank above which a smaller value is suggested."""


def too_big(spec: RunSpec, cluster: Cluster, closest: Candidate, in_host: tuple[int, int] | None) -> TooBigError:
    """The error for a run that fits in no layout.

    in_host: (layers, bytes) that host memory is too small for, where that is what is missing.
    """
    message = f"{spec.model} at {spec.bits} bits {shortage(closest)}{' of --max-memory' if spec.max_memory else ''}"
    if in_host:
        layers, held = in_host
        message += (
            f"; {layers} layers could be offloaded to host memory, but they are {format_bytes(held)} and "
            f"{USABLE_SHARE * 100:.0f} % of it {format_bytes(USABLE_SHARE * cluster.memory_bytes)}"
        )
    return TooBigError(message, ways=list(_ways(spec, cluster, in_host[1] if in_host else 0)))


def too_many_offloaded(spec: RunSpec, cluster: Cluster, winner: Candidate, sizes: Sizes) -> TooBigError | None:
    """The error if host memory cannot hold the offloaded layers; None if it can."""
    needed, room = sizes.held_by(winner.offloaded), int(USABLE_SHARE * cluster.memory_bytes)
    if needed <= room:
        return None
    message = (
        f"{counted(len(winner.offloaded), 'offloaded layer')} need {format_bytes(needed)} of host memory; "
        f"{USABLE_SHARE * 100:.0f} % of this machine's is {format_bytes(room)}"
    )
    fewer: list[Change] = [{"split.offload_layers": room // sizes.widest_layer}, {"split.offload_layers": None}]
    return TooBigError(message, ways=[*fewer, *_ways(spec, cluster, needed)])


def too_many_ranks(setting: PlanningContext, cluster: Cluster, winner: Candidate) -> TooBigError | None:
    """The error if there is no GPU and a machine's memory cannot hold all its ranks; None if it can."""
    spec, world = setting.spec, setting.world(winner.layout)
    of_nodes = [
        [winner.budgets[rank % len(winner.budgets)].total for rank in world.ranks_on(Node(node))]
        for node in range(len(world.ranks_of_nodes))
    ]
    node, own = max(enumerate(of_nodes), key=lambda each: sum(each[1]))
    if sum(own) <= cluster.memory_bytes:
        return None
    ranks, where = len(own), cluster.nodes[node].name if setting.nodes else "this machine"
    message = (
        f"{spec.model} at {spec.bits} bits on {counted(ranks, 'CPU rank')} needs {format_bytes(sum(own))}; "
        f"{where} has {format_bytes(cluster.memory_bytes)}, no GPU"
    )
    fitting = min(cluster.memory_bytes // max(own), ranks - 1)
    whole = not (spec.placement and winner.layer_map)  # else fewer ranks hold more layers each
    fewer: list[Change] = [{"gpus": number} for number in (fitting, 1) if number and whole]
    return TooBigError(message, ways=[*fewer, *_ways(spec, cluster, 0)])


def needs(plan: Plan) -> str:
    """'21.4 GiB a GPU, shard'."""
    budgets: list[MemoryBudget] = [own for rank in plan.ranks for own in rank.expected]
    required = max(plan.load_peak_bytes, *(own.required for own in budgets))
    away = f", {counted(len(plan.offloaded_layers), 'layer')} in host memory" if plan.offloaded_layers else ""
    return f"{format_bytes(required)} a {unit_of(plan)}, {plan.placement}{away}"


def _ways(spec: RunSpec, cluster: Cluster, in_host: int) -> Iterator[Change]:
    """Changes to try: settings, each alone and then all together; then host memory, then GPUs."""
    yield from _eased(spec)
    yield from _placed(spec)
    now, all_eased = flatten(spec), dict[str, object]()
    for ease in (*_eased(spec), OPEN):
        all_eased |= {key: value for key, value in ease.items() if now[key] != value}
        yield dict(all_eased)
    if in_host:
        yield {"host_memory": f"{ceil(in_host / USABLE_SHARE / GIB)}GiB"}
    smallest, count = min((gpu.total_bytes for gpu in cluster.gpus), default=0), len(cluster.gpus)
    for gib in _LARGER_GIB if spec.max_memory else ():
        if gib * GIB <= smallest:
            yield {"max_memory": f"{gib}GiB", **all_eased}
    for more in _MORE_GPUS if cluster.described else ():
        if more > count:
            yield {"gpus": more, "gpus_per_group": None, **all_eased}
    rest: Change = {**all_eased, **({"max_memory": None} if spec.max_memory else {})}
    if count > 1 and not cluster.described and spec.gpus is None:
        rest = {"gpus": count, **rest}  # a machine that is described has what is asked for
    larger = [gib for gib in _LARGER_GIB if gib * GIB > smallest]
    for gib in larger:
        yield {"gpu_memory": f"{gib}GiB", **rest}
    for more, gib in _BOTH:
        if more > count and gib in larger:
            yield {"gpu_memory": f"{gib}GiB", **rest, "gpus": more, "gpus_per_group": None}


def _eased(spec: RunSpec) -> Iterator[Change]:
    """Changes to memory-hungry settings that the user fixed, the cheapest to give up first."""
    if spec.pack:
        yield {"pack": None}
    if spec.micro_batch not in (None, 1):
        yield {"micro_batch": 1}
    if spec.train.checkpointing is False:
        yield {"train.checkpointing": True}
    if spec.optim.name in ("adamw", "adamw-8bit"):
        yield {"optim.name": None}
    if spec.zero.stage is not None:
        yield {"zero.stage": None}
    if spec.dtype == "float32":
        yield {"dtype": None}
    if spec.bits > 4:
        yield {"bits": 4}
    if spec.lora.r > _SMALL:
        yield {"lora.r": _SMALL}
    half = spec.seq_len // 2
    while half >= _SHORT:
        yield {"seq_len": half}
        half //= 2


def _placed(spec: RunSpec) -> Iterator[Change]:
    """Changes to groups of another size, then to another placement than the one named."""
    if not spec.placement:
        return
    if spec.gpus_per_group:
        (own,) = (placement for placement in PLACEMENTS if placement.name == spec.placement)
        yield {"gpus_per_group": None, **_without(spec, own)}
    for other in PLACEMENTS[1:]:
        if other.name != spec.placement:
            yield {**OPEN, "placement": other.name, **_without(spec, other)}


def _without(spec: RunSpec, placement: Placement) -> Change:
    """Change that turns off the settings that a placement does not support."""
    now = flatten(spec)
    return {key: value for key, value in placement.without.items() if now[key] not in (0, value)}


_WORTH_SAYING = 0.1
"""Share of idle pipeline time above which a larger batch is worth a note."""


def notes(setting: PlanningContext, winner: Candidate, barred: SpecError | None) -> Iterator[str]:
    """One sentence for each decision that one would not guess.

    barred: why a faster layout was passed over, if one was.
    """
    spec, layers = setting.spec, setting.sizes.facts.layer_count
    if barred and winner.layout.schedule and spec.split.schedule is None:
        yield f"{winner.layout.schedule}: {barred.message}"
    if winner.offloaded:
        why = ", since nothing else fits" if spec.split.offload_layers is None else ""
        held = format_bytes(setting.sizes.held_by(winner.offloaded))
        yield (
            f"{len(winner.offloaded)} of {layers} layers are offloaded to host memory{why}: {held} of it; "
            "each pass copies them to the GPU"
        )
    if winner.checkpointed and spec.train.checkpointing is None:
        which = "every layer" if winner.checkpointed == layers else f"{winner.checkpointed} of {layers} layers"
        yield f"activations of {which} do not fit and are recomputed in the backward pass"
    stages = winner.layout.stages
    idle = (stages - 1) / (winner.micro_batches + stages - 1)
    if idle > _WORTH_SAYING:
        unit = "GPU" if setting.rooms is not None else "rank"
        yield (
            f"with {winner.micro_batches} micro-batches in {stages} stages each {unit} waits {100 * idle:.0f} % of "
            "the time; a larger global_batch waits less"
        )
    if winner.layout.zero_stage == 3:
        yield (
            "zero.stage=3 gathers adapters that stay whole on every rank: 7B on 2 H200s ran at 18,517 tokens/s under "
            "it, at 21,976 under zero.stage=2"
        )


def graph_notes(spec: RunSpec, device: str, eager: str) -> Iterator[str]:
    """A note where a GPU's passes are not captured, and nobody asked for that. eager: why."""
    if device == "cuda" and eager and spec.graphs is None:
        yield f"passes are launched kernel by kernel, not as CUDA graphs: {eager}"


def packing_notes(setting: PlanningContext, winner: Candidate) -> Iterator[str]:
    """Note on samples that are short enough to be packed and are not."""
    batches = setting.batches(winner.layout)
    if winner.fill is None or setting.spec.pack is not None or setting.rooms is None:
        return
    if batches.mean_length >= WORTH * batches.longest:
        return
    if winner.packed:
        yield (
            f"samples of {batches.mean_length:,.0f} tokens on average are packed, several in a row: "
            f"{100 * winner.fill.share:.0f} % of the positions hold tokens"
        )
    elif setting.unpackable:
        yield f"short samples are not packed: {setting.sizes.facts.name} {setting.unpackable}"


NO_FLA = "is not installed"
"""Usual reason why flash-linear-attention is not used, a phrase to follow its name."""


def model_notes(facts: ModelFacts, recurrence: Recurrence | None, no_fla: str) -> Iterator[str]:
    """Notes on what a plan assumes of a model's layers."""
    if not facts.measured:
        yield (
            f"the activations of {facts.family} are computed from its shapes, not measured yet: "
            f"{100 * UNMEASURED_SHARE:.0f} % are added"
        )
    if recurrence == "torch":
        count = sum(run.count for run in facts.layers if run.shape.mixer == "recurrent")
        yield (
            f"{count} of {facts.layer_count} layers are recurrent and run torch's slow operations: "
            f"flash-linear-attention {no_fla or 'is for GPUs'}"
        )


def dtype_notes(dtype: str, cluster: Cluster) -> Iterator[str]:
    """Notes on an arithmetic that the card was not built for."""
    slow = next((gpu.name for gpu in cluster.kinds if not has_bfloat16(gpu.name)), None)
    if dtype == "bfloat16" and slow:
        yield f"a {slow} emulates bfloat16, which is slow: --set dtype=float16 uses its matrix units"


def warmup_notes(optim: Optim, steps: int) -> Iterator[str]:
    """Note if the run ends before its learning rate has warmed up."""
    if steps < optim.warmup_steps:
        reached = f"{optim.lr * steps / optim.warmup_steps:.1e} of {optim.lr:.1e}"
        yield f"optim.warmup_steps={optim.warmup_steps} of {steps} steps: the rate ends at {reached}"


def correction_notes(correction: Correction | None) -> Iterator[str]:
    """Note on what earlier runs changed in the prediction."""
    if correction is None:
        return
    what = [
        "speed" if correction.speeds else "",
        "context" if correction.context_bytes is not None else "",
    ]
    by = "by earlier runs" if not correction.runs else f"by {correction.runs} earlier run"
    by += "s" if correction.runs > 1 else ""
    yield f"{' and '.join(filter(None, what)) or 'speed'} corrected {by} on this kind of card"
