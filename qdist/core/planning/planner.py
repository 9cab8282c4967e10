"""Makes the plan from what the user wants and what the machine is. Pure."""

import math
from functools import cache
from typing import Literal, NamedTuple

import msgspec

from qdist.core.errors import MACHINE, Change, QdistError, SpecError
from qdist.core.machine.calibration import Correction
from qdist.core.machine.cards import rates_for
from qdist.core.machine.cluster import Cluster, Machine, Rates
from qdist.core.machine.cluster import changed as machine_changed
from qdist.core.machine.world import Rank, checked_world
from qdist.core.model.shapes import ModelFacts
from qdist.core.planning.activations import Recurrence
from qdist.core.planning.advice import (
    NO_FLA,
    correction_notes,
    dtype_notes,
    graph_notes,
    model_notes,
    needs,
    notes,
    packing_notes,
    too_big,
    too_many_offloaded,
    too_many_ranks,
    warmup_notes,
)
from qdist.core.planning.batch import cheap_batch, first_batch, network_notes, uncounted, with_batch
from qdist.core.planning.candidates import USABLE_SHARE, Candidate, arrange
from qdist.core.planning.context import PlanningContext
from qdist.core.planning.fill import MicroBatch
from qdist.core.planning.graphs import require_captured, why_eager
from qdist.core.planning.memory import MemoryBudget, sizes
from qdist.core.planning.network import ASSUMED
from qdist.core.planning.packing import packs_samples
from qdist.core.planning.placements.registry import layouts
from qdist.core.planning.plan import Alternative, DataFacts, Plan, RankPlan, Source
from qdist.core.planning.ranking import (
    alternatives,
    barred,
    choose,
    closest,
    contenders,
    eligible,
    host_memory_wanted,
    last_resort,
    nonexistent,
)
from qdist.core.planning.resources import (
    counts_of,
    dtype_of,
    liger_of,
    optimizer_of,
    recurrence_of,
    require_compute,
    rooms_of,
    shape_of,
)
from qdist.core.planning.unsupported import require_supported
from qdist.core.spec.run_spec import RunSpec, changed, flatten
from qdist.core.spec.sections import MOST_STEPS, Optimizer
from qdist.core.spec.suggest import or_tried_hint

__all__ = ["USABLE_SHARE", "make_plan", "plan_once"]


class _Inputs(NamedTuple):
    """Arguments of `make_plan`, and what it decides before looking for a layout."""

    spec: RunSpec
    source: Source
    facts: ModelFacts
    cluster: Cluster
    longest: int
    dtype: Literal["bfloat16", "float16", "float32"]
    liger: bool
    optimizer: Optimizer
    rates: Rates | None
    correction: Correction | None
    recurrence: Recurrence | None
    usual: MicroBatch | None
    data: DataFacts | None


class _Decision(NamedTuple):
    setting: PlanningContext
    winner: Candidate
    rows: list[list[Candidate]]
    nonexistent: tuple[Alternative, ...]


def make_plan(
    spec: RunSpec,
    source: Source,
    facts: ModelFacts,
    cluster: Cluster,
    data: DataFacts | None,
    *,
    has_liger: bool = False,
    no_fla: str = NO_FLA,
    usual: MicroBatch | None = None,
    correction: Correction | None = None,
) -> Plan:
    """Decide placement, batches, precision and engine.

    has_liger: whether liger-kernel is installed. no_fla: why flash-linear-attention is not used; empty if it is.
    usual: the micro-batch that the run had before it was resumed. It is kept where the ranks allow, since dropout is
    drawn for each micro-batch.
    correction: what runs on this machine have taught.

    Raises PlanError, with the missing bytes, when the run does not fit, and SpecError where settings or the batch
    arithmetic cannot work out; each with a change that was tried.
    """

    def attempt(change: Change) -> Plan:
        own = changed(spec, {key: value for key, value in change.items() if key not in MACHINE})
        return plan_once(
            own,
            source,
            facts,
            machine_changed(cluster, change, own.gpus),
            data,
            has_liger=has_liger,
            no_fla=no_fla,
            usual=usual,
            correction=correction,
        )

    return or_tried_hint(attempt, flatten(spec), remark=needs)


def plan_once(
    spec: RunSpec,
    source: Source,
    facts: ModelFacts,
    cluster: Cluster,
    data: DataFacts | None,
    *,
    has_liger: bool = False,
    no_fla: str = NO_FLA,
    usual: MicroBatch | None = None,
    correction: Correction | None = None,
) -> Plan:
    """Like `make_plan`, but the suggestions of a refusal are untried."""
    require_supported(spec, facts, source.config)
    require_compute(spec, cluster)
    counts = counts_of(spec, cluster)
    longest = min(spec.seq_len, data.longest) if data else spec.seq_len
    if longest > facts.max_positions:
        raise SpecError(
            f"seq_len={longest}, but {spec.model} has {facts.max_positions} positions",
            ways=[{"seq_len": facts.max_positions}],
        )
    if (spec.split.offload_layers or 0) > facts.layer_count:
        raise SpecError(
            f"split.offload_layers={spec.split.offload_layers}, but {spec.model} has {facts.layer_count} layers",
            ways=[{"split.offload_layers": facts.layer_count}, {"split.offload_layers": None}],
        )
    auto = spec.global_batch is None
    rates, rate_notes = rates_for(cluster)
    inputs = _Inputs(
        spec=spec,
        source=source,
        facts=facts,
        cluster=cluster,
        longest=longest,
        dtype=dtype_of(spec, cluster),
        liger=liger_of(spec, cluster, has_liger),
        optimizer=optimizer_of(spec, cluster),
        rates=rates,
        correction=correction,
        recurrence=recurrence_of(facts, cluster, fla=not no_fla),
        usual=usual,
        data=data,
    )
    inputs, decision = _with_batch(inputs, counts)
    spec = inputs.spec
    setting, winner, layout = decision.setting, decision.winner, decision.winner.layout
    eager = why_eager(
        spec, facts, layout, device=cluster.device, compute_dtype=inputs.dtype, config=source.config,
        recomputed=winner.checkpointed, offloaded=len(winner.offloaded),
    )  # fmt: skip
    require_captured(spec, eager)

    def tokens_s(candidate: Candidate) -> float:
        return setting.batches(candidate.layout).tokens / candidate.seconds if candidate.seconds else 0.0

    return Plan(
        spec=spec,
        source=source,
        facts=facts,
        data=data,
        pool=setting.sizes.job.adapter.pool,
        device=cluster.device,
        placement=layout.placement,
        schedule=layout.schedule,
        groups=layout.groups,
        gpus_per_group=layout.gpus_per_group,
        layer_map=winner.layer_map,
        offloaded_layers=winner.offloaded,
        world_size=layout.world_size,
        micro_batch=winner.micro_batch,
        gradient_accumulation=winner.micro_batches,
        packed=winner.packed,
        fill=winner.fill,
        graphs=not eager,
        steps=_steps(spec, data),
        seq_len=longest,
        checkpointed_layers=winner.checkpointed,
        compute_dtype=inputs.dtype,
        optimizer="adamw" if inputs.optimizer == "paged-adamw" and not winner.paged else inputs.optimizer,
        engine=layout.engine,
        zero_stage=layout.zero_stage,
        liger=inputs.liger,
        recurrence=inputs.recurrence,
        threads_per_rank=max(1, cluster.cpu_count // max(setting.world(layout).ranks_of_nodes)),
        ranks=_ranks(setting, winner, cluster.device),
        tokens_per_second=round(tokens_s(winner), 1),
        load_peak_bytes=max(winner.load_peaks),
        nodes=_machines(cluster, counts),
        network=setting.network if setting.nodes else None,
        network_bytes=round(winner.network_bytes),
        network_seconds=winner.network_s,
        alternatives=(*alternatives(setting, winner, decision.rows, tokens_s), *decision.nonexistent),
        correction=correction,
        notes=(
            *notes(setting, winner, barred(setting, winner, decision.rows)),
            *packing_notes(setting, winner),
            *model_notes(facts, inputs.recurrence, no_fla),
            *dtype_notes(inputs.dtype, cluster),
            *graph_notes(spec, cluster.device, eager),
            *rate_notes,
            *network_notes(setting, winner, cluster, auto=auto),
            *correction_notes(correction),
            *(warmup_notes(spec.optim, _steps(spec, data)) if data else ()),
        ),
    )


_MOST_TRIES = 5
"""Batches that are tried where the planner decides: a larger one may have room for larger micro-batches."""


def _with_batch(inputs: _Inputs, counts: tuple[int, ...]) -> tuple[_Inputs, _Decision]:
    """The decision, with the global batch as it is set; or as it makes the network cheap."""
    if inputs.spec.global_batch is not None:
        return inputs, _decide(inputs, counts)
    batch = first_batch(inputs.spec, counts)
    for _ in range(_MOST_TRIES):
        own = inputs._replace(spec=with_batch(inputs.spec, batch), data=uncounted(inputs.data, batch))
        decision = _decide(own, counts)
        cheap = cheap_batch(decision.setting, decision.winner)
        if not cheap:
            break
        batch = cheap
    return own, decision


def _decide(inputs: _Inputs, counts: tuple[int, ...]) -> _Decision:
    """The best candidate, and all that were tried. Raises PlanError when none fits."""
    spec, cluster, count = inputs.spec, inputs.cluster, sum(counts)
    setting = _setting(inputs, counts)
    found = layouts(spec, count, device=cluster.device, nodes=setting.nodes)
    rows = contenders(setting, found)
    tried = eligible(setting, rows)
    # Groups span nodes only where none within a node fits.
    winner = choose(own for own in tried if not setting.world(own.layout).spanning)
    winner = winner or choose(tried) or last_resort(setting, count)
    if winner is None:
        raise too_big(spec, cluster, closest(tried), host_memory_wanted(setting, count))
    refused: QdistError | None = too_many_offloaded(spec, cluster, winner, setting.sizes)
    if cluster.device == "cpu":
        refused = too_many_ranks(setting, cluster, winner)
    if not cluster.nodes:  # a run of several nodes that is left with one goes on
        refused = refused or winner.layout.nothing_crosses(spec)
    if refused:
        raise refused
    return _Decision(setting, winner, rows, nonexistent(setting, found))


def _setting(inputs: _Inputs, counts: tuple[int, ...]) -> PlanningContext:
    spec, source = inputs.spec, inputs.source
    # Before a model is prepared nobody knows which of the tokens it has: they all count as new.
    new_rows = len(source.new_token_ids) or (len(spec.new_tokens) if source.kind == "dummy" else 0)
    shape = shape_of(
        spec, inputs.facts, inputs.cluster, config=source.config, gptq=source.gptq, dtype=inputs.dtype,
        liger=inputs.liger, recurrence=inputs.recurrence,
    )  # fmt: skip
    job = msgspec.structs.replace(
        shape,
        fp8=spec.compute == "fp8",
        seq_len=inputs.longest,
        fused_loss=inputs.liger,
        lora_dropout=spec.lora.dropout > 0,
        optimizer_on_gpu=spec.zero.offload == "none",
        paged=inputs.optimizer == "paged-adamw",
        eight_bit=inputs.optimizer == "adamw-8bit",
    )
    return PlanningContext(
        spec=spec,
        sizes=sizes(inputs.facts, job),
        rooms=rooms_of(spec, inputs.cluster, counts),
        nodes=counts if len(counts) > 1 else (),
        network=inputs.cluster.network or ASSUMED,
        host_bytes=inputs.cluster.memory_bytes,
        rates=inputs.rates,
        whole_tables=source.vocab_rows is not None or new_rows > 0,
        correction=inputs.correction,
        data=inputs.data,
        usual=inputs.usual,
        unpackable=packs_samples(inputs.facts),
        new_rows=new_rows,
        fullest=inputs.data.fullest if inputs.data and inputs.cluster.device == "cpu" else (),
        dtype=inputs.dtype,
        config=source.config,
    )


def _machines(cluster: Cluster, counts: tuple[int, ...]) -> tuple[Machine, ...]:
    """The nodes with what the run uses of them; none for one machine."""
    if len(cluster.nodes) < 2:
        return ()
    return tuple(Machine(name=node.name, gpus=count) for node, count in zip(cluster.nodes, counts, strict=True))


def _ranks(setting: PlanningContext, winner: Candidate, device: str) -> tuple[RankPlan, ...]:
    """The grid's processes, group by group."""
    layout, world = winner.layout, checked_world(setting.world(winner.layout))
    own = world.gpus_per_rank

    @cache
    def of_group(data_rank: int) -> tuple[MemoryBudget, ...]:
        return _budgets(setting, winner, data_rank)

    def budgets(rank: Rank) -> tuple[MemoryBudget, ...]:
        data_rank, stage = divmod(rank, layout.stages)
        return of_group(data_rank)[stage * own : (stage + 1) * own]

    return tuple(
        RankPlan(
            rank=rank,
            node=world.node_of(rank),
            gpus=world.gpus_of(rank) if device == "cuda" else (),
            expected=budgets(rank),
            group=world.group_of(rank),
            position=world.position_of(rank),
        )
        for rank in world.ranks
    )


def _budgets(setting: PlanningContext, winner: Candidate, rank: int) -> tuple[MemoryBudget, ...]:
    """Memory budgets of a data-parallel rank, from its own micro-batches if the data were counted."""
    if not setting.fullest:
        return winner.budgets
    own = setting._replace(rank=rank)
    micro_batch = MicroBatch(winner.micro_batch, winner.packed)
    return arrange(own, winner.layout, micro_batch, winner.checkpointed, len(winner.offloaded)).budgets


def _steps(spec: RunSpec, data: DataFacts | None) -> int:
    """Steps of the run: as set, or the epochs (one by default) over the training samples, rounded up."""
    if spec.steps is not None:
        return spec.steps
    if data is None or data.epoch == 0:
        raise SpecError("synthetic data have no epochs", ways=[{"steps": 20, "epochs": None}])
    steps = math.ceil((spec.epochs or 1.0) * data.epoch / spec.batch)
    if steps > MOST_STEPS:
        raise SpecError(
            f"epochs={spec.epochs:g} over {data.epoch:,} samples are more steps than can be counted",
            ways=[{"epochs": None}],
        )
    return steps
