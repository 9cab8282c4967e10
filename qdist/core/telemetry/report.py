"""A run as the sections of its report, and two runs beside each other: plain data, from what their directories hold."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from qdist.core.evaluation.results import Evaluation
from qdist.core.machine.cluster import Cluster
from qdist.core.planning.plan import Plan
from qdist.core.planning.sources import sources_in_words
from qdist.core.telemetry.curves import Chart, Marks, charts, marks
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.inventory import rows_of
from qdist.core.telemetry.memory_report import MemoryParts, memory_of, shown
from qdist.core.telemetry.nodes import NodesNow
from qdist.core.telemetry.report_sections import (
    Rows,
    StepPart,
    Table,
    choices_of,
    counted_steps,
    generations_table,
    held_out_table,
    machine_rows,
    measured_speed,
    metrics_of,
    number,
    numbers_table,
    pace_rows,
    processors,
    ranks_table,
    settings_table,
    step_parts,
    took,
)
from qdist.core.telemetry.snapshot import Snapshot
from qdist.core.telemetry.warnings import find_warnings
from qdist.core.text import counted, format_bytes, format_count, format_duration, signed


class SampleAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A held-out question with the model's answers before and after training, and the one in the data."""

    question: str
    before: str
    after: str
    expected: str


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a run directory says, as far as it says it."""

    seen: Snapshot
    result: Mapping[str, Any] | None = None
    """Contents of `result.json`."""
    machine: Cluster | None = None
    versions: Mapping[str, str] = {}
    recipe: str = ""
    """Contents of `recipe.toml`."""
    commands: tuple[str, ...] = ()
    """Each launch command as typed; empty if the run kept none."""
    evaluations: tuple[Evaluation, ...] = ()
    """What `qdist evaluate` found of the run's models."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The sections of a page. An empty one has nothing to say yet."""

    name: str
    state: str
    headline: str
    message: str
    try_: str
    summary: Rows
    commands: tuple[str, ...]
    recipe: str
    warnings: tuple[str, ...]
    charts: tuple[Chart, ...]
    marks: Marks
    numbers: Table
    memory: tuple[MemoryParts, ...]
    """Memory by part of each GPU, or of the fullest of those that are alike."""
    on_cpu: bool
    step: tuple[StepPart, ...]
    pace: Rows
    inventory: Rows
    """What was trained on, and whether all of it got gradients."""
    ranks: Table
    generations: Table
    """Generations of the nodes of a run of several; without rows for one machine."""
    held_out: Table
    evaluations: tuple[Evaluation, ...]
    """What tasks found of the run's models."""
    answers: tuple[SampleAnswer, ...]
    settings: Table
    """Settings that differ from their defaults."""
    machine: Rows
    versions: Rows
    choices: dict[str, str]
    """Every setting and decision, to compare runs by."""
    metrics: dict[str, float]
    """Metrics to compare runs by, as far as known. Units are in the keys."""


def report_of(found: Found) -> Report:
    """The report of a run in any state."""
    seen, result = found.seen, found.result
    plan, fold = seen.plan, seen.fold
    curves, memory, speed = charts(fold), memory_of(plan, fold, result), measured_speed(fold, result)
    return Report(
        name=seen.name,
        state=seen.state,
        headline=_headline(seen),
        message=seen.message,
        try_=seen.try_,
        summary=tuple(_summary(plan, fold, seen.nodes)),
        commands=found.commands,
        recipe=found.recipe,
        warnings=tuple(one.sentence for one in find_warnings(seen, result=result, whole=True)),
        charts=curves,
        marks=marks(fold),
        numbers=numbers_table(curves),
        memory=shown(memory),
        on_cpu=plan.device == "cpu",
        step=step_parts(fold),
        pace=tuple(pace_rows(plan, fold, result, speed)),
        inventory=(*rows_of(fold.inventory), *((("gradients", fold.gradients),) if fold.gradients else ())),
        ranks=ranks_table(fold, seen.node_of_rank),
        generations=generations_table(seen.nodes),
        held_out=held_out_table(fold),
        evaluations=found.evaluations,
        answers=tuple(msgspec.convert(answer, SampleAnswer) for answer in (result or {}).get("answers", ())),
        settings=settings_table(plan.spec),
        machine=tuple(machine_rows(found.machine)),
        versions=tuple(found.versions.items()),
        choices=choices_of(plan),
        metrics=metrics_of(plan, fold, memory, result),
    )


def _headline(seen: Snapshot) -> str:
    fold, total = seen.fold, seen.fold.total_steps or seen.plan.steps
    done = f"step {fold.step:,} of {total:,}"
    if seen.state == "finished":
        early = fold.ended_early
        return f"{early[0].upper()}{early[1:]}." if early else f"Finished all {counted_steps(total)}."
    if seen.state == "running":
        left = fold.seconds_left
        return f"Running, {done}" + (f", about {format_duration(left)} left." if left is not None else ".")
    return {
        "planned": "Planned, and never started.",
        "stopped": f"Stopped on request at {done}.",
        "failed": f"Failed at {done}.",
        "killed": f"Killed at {done}.",
    }[seen.state]


def _summary(plan: Plan, fold: RunHistory, nodes: NodesNow | None) -> Iterator[tuple[str, str]]:
    spec, unit = plan.spec, "CPU process" if plan.device == "cpu" else "GPU"
    count = processors(plan)
    yield "Model", f"{spec.model}, {format_count(plan.facts.parameters)} parameters"
    yield "Method", f"{spec.method}, {spec.bits} bits, {plan.adapter.title} {spec.lora}"
    schedule = f" {plan.schedule}" if plan.schedule else ""
    yield "Placement", f"{plan.placement}{schedule}, {counted(plan.groups, 'group')} of {plan.gpus_per_group}"
    engine = f"DeepSpeed ZeRO-{plan.zero_stage}" if plan.engine == "deepspeed" else "torch"
    where = f"{count} {unit}{'' if count == 1 else 'es' if unit.endswith('s') else 's'}"
    yield "Ranks", f"{plan.world_size} on {where}, {engine}, {plan.optimizer}, {plan.compute_dtype}"
    if nodes and nodes.members:
        yield "Nodes", ", ".join(member.name for member in nodes.members)
    yield "Data", _data(plan)
    yield "Batch", f"{spec.batch} samples a step, {_at_a_time(plan)} at a time on a rank"
    yield "Steps", f"{fold.step:,} of {fold.total_steps or plan.steps:,}"
    if fold.trained_s:
        yield "Duration", format_duration(fold.trained_s)
        yield ("GPU hours" if plan.device == "cuda" else "Rank hours"), f"{fold.trained_s * count / 3600:.3g}"
    if tokens := sum(fold.columns.tokens):
        yield "Tokens", f"{tokens:,} trained on"


def _at_a_time(plan: Plan) -> str:
    row = f"packed in rows of {plan.micro_batch * plan.seq_len:,} positions, one"
    return row if plan.packed else f"{plan.micro_batch}"


def _data(plan: Plan) -> str:
    if plan.data is None:
        return f"random tokens, samples of {plan.seq_len}"
    data = plan.data
    left_out = f", {data.bad:,} bad records left out" if data.bad else ""
    whole = (
        f"{plan.spec.data.path}: {data.train_samples:,} samples and {data.held_out_samples:,} held out, "
        f"{data.tokens:,} tokens, the longest {data.longest:,}{left_out}"
    )
    return "; ".join((whole, *sources_in_words(data)))


_METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("Loss, mean of the last steps, 20 at most", number),
    "held_out_loss": ("Held-out loss, last", number),
    "best_held_out_loss": ("Held-out loss, best", number),
    "steps": ("Steps", lambda value: f"{value:,.0f}"),
    "tokens": ("Tokens", lambda value: f"{value:,.0f}"),
    "tokens_per_s": ("Useful tokens/s", format_count),
    "positions_per_s": ("Tokens/s with padding", format_count),
    "step_s": ("Time of a step", took),
    "padding_share": ("Padding", lambda value: f"{100 * value:.1f} %"),
    "peak_bytes": ("Peak memory, fullest", format_bytes),
    "duration_s": ("Duration", format_duration),
    "gpu_hours": ("Hours of all GPUs or ranks", lambda value: f"{value:.3g}"),
}


def metrics_beside(a: Report, b: Report) -> Table:
    """Metrics of both runs or of one, and the difference of B from A."""
    rows = []
    for key, (label, as_text) in _METRICS.items():
        first, second = a.metrics.get(key), b.metrics.get(key)
        if first is None and second is None:
            continue
        difference = signed(second / first - 1) if first and second is not None else ""
        rows.append((label, *("-" if value is None else as_text(value) for value in (first, second)), difference))
    return Table(headers=("", a.name, b.name, "B against A"), rows=tuple(rows))


def differences(a: Report, b: Report) -> Table:
    """Settings, decisions and versions that differ."""
    mine, other = a.choices | dict(a.versions), b.choices | dict(b.versions)
    keys = [*mine, *(key for key in other if key not in mine)]
    rows = tuple(
        (key, mine.get(key, "-"), other.get(key, "-")) for key in keys if mine.get(key, "-") != other.get(key, "-")
    )
    return Table(headers=("", a.name, b.name), rows=rows)
