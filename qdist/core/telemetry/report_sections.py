"""The sections of a run's report that need more than a line: tables, rows and figures from a plan and a fold."""

import math
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

import msgspec

from qdist.core.machine.cluster import Cluster
from qdist.core.planning.fill import has_padding
from qdist.core.planning.plan import Plan
from qdist.core.spec.keys import json_text
from qdist.core.spec.run_spec import RunSpec, flatten
from qdist.core.telemetry.curves import Chart, evenly, value_at
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.memory_report import MEANING, MemoryParts, shown_error
from qdist.core.telemetry.nodes import NodeMember, NodesNow
from qdist.core.text import format_bytes, format_count, format_duration

_MOST_ROWS = 24
"""Most rows of the curves' table."""

Rows = tuple[tuple[str, str], ...]
"""Labels, each with its value in words."""


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Cells as a person reads them."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class StepPart(msgspec.Struct, frozen=True, kw_only=True):
    """Part of a step: mean milliseconds, and its share of the whole."""

    name: str
    milliseconds: float
    share: float

    @property
    def time(self) -> str:
        """The time in words."""
        return took(self.milliseconds / 1000)


def counted_steps(steps: int) -> str:
    """'1 step', '5,000 steps'."""
    return f"{steps:,} step{'' if steps == 1 else 's'}"


def processors(plan: Plan) -> int:
    """GPUs of the run, or its processes on CPUs."""
    return sum(len(rank.gpus) or 1 for rank in plan.ranks)


def measured_positions(fold: RunHistory, result: Mapping[str, Any] | None) -> float | None:
    """Measured positions/s, padding included, over the same steps as `measured_speed`."""
    measured = (result or {}).get("positions_per_s", {}).get("measured")
    return fold.positions_per_s if measured is None else float(measured)


def measured_speed(fold: RunHistory, result: Mapping[str, Any] | None) -> float | None:
    """Measured tokens/s: of the whole run once it is finished, until then of the last steps."""
    measured = (result or {}).get("tokens_per_s", {}).get("measured")
    return fold.tokens_per_s if measured is None else float(measured)


def numbers_table(curves: tuple[Chart, ...]) -> Table:
    """Some steps of all curves, for readers without scripts."""
    if not curves:
        return Table(headers=(), rows=())
    series = [one for chart in curves for one in chart.series if one.style != "points"]
    steps = evenly(series[0].x, _MOST_ROWS)
    held_out = next((dict(zip(one.x, one.y, strict=True)) for one in curves[0].series if one.style == "points"), {})
    return Table(
        headers=("step", *(one.name for one in series), "held-out"),
        rows=tuple(
            (f"{step:,}", *(number(value_at(one, step)) for one in series), number(held_out.get(step, math.nan)))
            for step in sorted({*steps, *evenly(list(held_out), _MOST_ROWS)})
        ),
    )


def number(value: float) -> str:
    """'1.234', '12,345', '0.0002', '1.0e+30', or '-' for NaN."""
    if not math.isfinite(value):
        return "-"
    if abs(value) >= 1e9:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def step_parts(fold: RunHistory) -> tuple[StepPart, ...]:
    """Parts of a step, averaged over all steps; empty if the events, from an older qdist, do not have them."""
    columns = fold.columns
    seconds, busy = sum(columns.seconds), sum(columns.busy_s)
    if not seconds or not busy:
        return ()
    data, update = sum(columns.data_s), sum(columns.update_s)
    parts = {
        "making samples": data,
        "forward and backward passes": max(0.0, busy - data),
        "waiting for other ranks, and all else": max(0.0, seconds - busy - update),
        "optimizer step": update,
    }
    return tuple(
        StepPart(name=name, milliseconds=1000 * spent / len(columns), share=spent / seconds)
        for name, spent in parts.items()
    )


def pace_rows(
    plan: Plan, fold: RunHistory, result: Mapping[str, Any] | None, speed: float | None
) -> Iterator[tuple[str, str]]:
    """Speed against its prediction, what was wasted, and how long the start took."""
    positions = measured_positions(fold, result)
    padded = has_padding(speed / positions if speed and positions else plan.useful_share)
    name = "Useful tokens/s" if padded else "Tokens/s"
    if plan.tokens_per_second:
        yield f"{name} predicted", format_count(plan.tokens_per_second)
    if speed:
        yield f"{name} measured", format_count(speed)
    if padded and positions:
        yield "Tokens/s with padding", format_count(positions)
    if off := shown_error(plan.tokens_per_second, speed):
        yield "Error of the prediction", f"{off} ({MEANING})"
    if fold.padding_share is not None:
        yield "Padding", f"{100 * fold.padding_share:.1f} % of the computed positions"
    if fold.skew:
        slowest, apart = fold.skew
        yield "Ranks apart", f"{100 * apart:.1f} %: rank {slowest} is the slowest"
    first = (result or {}).get("start_seconds", {}).get("first_step")
    if first is not None:
        yield "First step done after", format_duration(first)
    if phases := (result or {}).get("starting"):
        yield "Of these", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())
    if loading := (result or {}).get("loading", {}).get("seconds"):
        yield "Loading the backbone", f"{loading:.1f} s, {format_bytes((result or {})['loading']['read_bytes'])} read"


def took(seconds: float) -> str:
    """'38.2 ms', '13.2 s'."""
    return f"{1000 * seconds:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def ranks_table(fold: RunHistory, nodes: Mapping[int, str]) -> Table:
    """Last values from each rank. nodes: the name of each rank's node; empty for one machine."""
    rows = tuple(
        (
            *((nodes.get(rank, "-"),) if nodes else ()),
            str(rank),
            f"{own.last_step:,}",
            "-" if own.tokens_per_s is None else format_count(own.tokens_per_s),
            "-" if own.busy_s is None else took(own.busy_s),
            format_bytes(own.memory_bytes) if own.memory_bytes else "-",
        )
        for rank, own in sorted(fold.present.items())
    )
    headers = ("rank", "last step", "own tokens/s while busy", "busy a step", "peak memory")
    return Table(headers=("node", *headers) if nodes else headers, rows=rows)


def generations_table(nodes: NodesNow | None) -> Table:
    """When each generation of a run's nodes was formed, from which step, and of whom; of very many the last ones."""
    kept = nodes.generations[-_MOST_ROWS:] if nodes else ()
    rows = tuple(
        (
            f"{one.number}",
            f"after {format_duration(one.time - nodes.generations[0].time)}",
            f"{one.step:,}",
            ", ".join(map(_member, one.members)),
        )
        for one in kept
        if nodes
    )
    return Table(headers=("generation", "formed", "from step", "nodes"), rows=rows)


def _member(member: NodeMember) -> str:
    """'b (ranks 2, 3)', 'c (ranks 4 to 11)'."""
    if not member.ranks:
        return member.name
    several = len(member.ranks) > 2
    shown = f"{member.ranks[0]} to {member.ranks[-1]}" if several else ", ".join(map(str, member.ranks))
    return f"{member.name} (rank{'s' if len(member.ranks) > 1 else ''} {shown})"


def held_out_table(fold: RunHistory) -> Table:
    """Evaluations with their tasks; of very many, evenly chosen ones and those with the lowest loss."""
    losses, tasks = dict(sorted(fold.held_out)), {task: dict(points) for task, points in fold.tasks.items()}
    steps = sorted({*losses, *(step for points in tasks.values() for step in points)})
    best = min(filter(math.isfinite, losses.values()), default=math.nan)
    chosen = {steps[index] for index in evenly(range(len(steps)), _MOST_ROWS)}

    def row(step: int, loss: float) -> tuple[str, ...]:
        figures = (number(points.get(step, math.nan)) for points in tasks.values())
        return f"{step:,}", number(loss), number(math.exp(min(loss, 700))), *figures, "best" if loss == best else ""

    rows = ((step, losses.get(step, math.nan)) for step in steps)
    return Table(
        headers=("step", "held-out loss", "perplexity", *tasks, ""),
        rows=tuple(row(step, loss) for step, loss in rows if step in chosen or loss == best),
    )


def settings_table(spec: RunSpec) -> Table:
    """Settings that differ from their defaults."""
    mine, usual = flatten(spec), flatten(RunSpec())
    rows = tuple((key, _value(mine[key]), _value(usual[key])) for key in mine if mine[key] != usual[key])
    return Table(headers=("setting", "value", "default"), rows=rows)


def _value(setting: object) -> str:
    return "auto" if setting is None else json_text(setting) or "none"


def machine_rows(machine: Cluster | None) -> Iterator[tuple[str, str]]:
    """Cards, cores, memory, and how fast they are."""
    if machine is None:
        return
    for gpu in machine.gpus:
        yield f"GPU {gpu.index}", f"{gpu.name}, {format_bytes(gpu.total_bytes)}, {format_bytes(gpu.free_bytes)} free"
    if not machine.gpus:
        yield "GPUs", "none"
    yield "CPU cores", f"{machine.cpu_count}"
    free = format_bytes(machine.memory_free_bytes)
    yield "Host memory", f"{format_bytes(machine.memory_bytes)}, {free} free at the launch"
    if rates := machine.rates:
        yield "16-bit matrix products", f"{rates.matmul_flops_s / 1e12:,.0f} TFLOP/s ({rates.source})"
        yield "Device memory", f"{rates.memory_bytes_s / 1e9:,.0f} GB/s ({rates.source})"
        yield "Links between GPUs", f"{rates.link_bytes_s / 1e9:,.1f} GB/s ({rates.source})"
        yield "Host to GPU", f"{rates.host_bytes_s / 1e9:,.1f} GB/s ({rates.source})"


def choices_of(plan: Plan) -> dict[str, str]:
    """Settings as given, and the plan's decisions."""
    decided = {
        key: str(getattr(plan, key))
        for key in (
            "device", "placement", "schedule", "groups", "gpus_per_group", "world_size", "micro_batch",
            "gradient_accumulation", "steps", "seq_len", "checkpointed_layers", "compute_dtype", "optimizer", "engine",
            "zero_stage", "liger", "packed",
        )
    }  # fmt: skip
    given = {key: _value(value) for key, value in flatten(plan.spec).items() if key != "run"}
    # What was given and kept is said once.
    return given | {f"{key}, as planned": value for key, value in decided.items() if given.get(key) != value}


def metrics_of(
    plan: Plan, fold: RunHistory, memory: tuple[MemoryParts, ...], result: Mapping[str, Any] | None
) -> dict[str, float]:
    """Metrics of a run, in the order in which a comparison shows them."""
    columns = fold.columns
    losses = [loss for loss in columns.loss[-20:] if math.isfinite(loss)]
    # At step 0 nothing has been learnt yet.
    held_out = [loss for step, loss in sorted(fold.held_out) if step and math.isfinite(loss)]
    peak = max((own.measured_bytes for own in memory), default=0)
    found: dict[str, float | None] = {
        "loss": fmean(losses) if losses else None,
        "held_out_loss": held_out[-1] if held_out else None,
        "best_held_out_loss": min(held_out) if held_out else None,
        "steps": float(fold.step),
        "tokens": float(sum(columns.tokens)),
        "tokens_per_s": measured_speed(fold, result),
        "positions_per_s": measured_positions(fold, result),
        "step_s": sum(columns.seconds) / len(columns) if len(columns) else None,
        "padding_share": fold.padding_share,
        "peak_bytes": float(peak) if peak else None,
        "duration_s": fold.trained_s or None,
        "gpu_hours": fold.trained_s * processors(plan) / 3600 if fold.trained_s else None,
    }
    return {key: value for key, value in found.items() if value is not None}
