"""A run's figures in Prometheus' text format, version 0.0.4, which node_exporter's textfile collector reads too.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, get_args

from qdist.core.planning.plan import Plan
from qdist.core.telemetry.events import State
from qdist.core.telemetry.heartbeat import Heartbeat, Phase
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.nodes import NodesNow

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[Mapping[str, str | int], float | None]
"""Labels besides `run`, and a value; None if unknown, which is not written."""


class Metric(NamedTuple):
    """One metric: name, meaning and values."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    samples: Iterable[Sample]


def exposition(
    run: str,
    plan: Plan,
    fold: RunHistory,
    pulses: Mapping[int, Heartbeat],
    state: State,
    nodes: NodesNow | None = None,
) -> str:
    """The text of all metrics, each value labelled with `run`. A metric without a value is left out.

    run: what the series are called apart by, such as the run directory. nodes: of a run of several machines, whose
    ranks have a label `node`.
    """
    of_ranks = [*_of_ranks(plan, fold, pulses)]
    if nodes:
        of_ranks = [*_of_nodes(nodes, fold), *_on_nodes(of_ranks, nodes.name_of_rank)]
    return text_of((*_of_run(plan, state), *_of_training(plan, fold), *of_ranks), {"run": run})


def text_of(metrics: Iterable[Metric], labels: Mapping[str, str]) -> str:
    """Metrics as Prometheus reads them, without those that have no value. labels: of every value."""
    lines: list[str] = []
    for name, kind, meaning, samples in metrics:
        values = [({**labels, **own}, value) for own, value in samples if value is not None]
        if values:
            lines += [f"# HELP {name} {_help(meaning)}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_labels(named)} {_number(value)}" for named, value in values]
    return "\n".join(lines) + "\n"


def _of_run(plan: Plan, state: State) -> Iterator[Metric]:
    about = {
        "model": plan.spec.model, "method": plan.spec.method, "bits": plan.spec.bits, "placement": plan.placement,
        "device": plan.device, "ranks": plan.world_size,
    }  # fmt: skip
    yield Metric("qdist_run_info", "gauge", "What the run is; always 1.", [(about, 1)])
    states = [({"state": each}, float(each == state)) for each in get_args(State)]
    yield Metric("qdist_run_state", "gauge", "1 for the state that the run is in, 0 for the others.", states)
    yield one("qdist_planned_steps", "Optimizer steps of the whole run.", plan.steps)
    predicted = plan.tokens_per_second or None
    yield one("qdist_predicted_tokens_per_second", "Predicted by the plan, all ranks together.", predicted)


def _of_training(plan: Plan, fold: RunHistory) -> Iterator[Metric]:
    yield one("qdist_step", "Optimizer steps done; goes back when a killed run is resumed.", fold.step)
    yield one("qdist_loss", "Training loss of the last step.", fold.loss)
    yield one("qdist_smoothed_loss", "Mean training loss of the last 10 steps.", fold.smoothed_loss)
    held_out = fold.held_out[-1][1] if fold.held_out else None
    yield one("qdist_held_out_loss", "Loss on held-out records at the last evaluation.", held_out)
    figures = [({"task": task}, points[-1][1]) for task, points in fold.tasks.items() if points]
    yield Metric("qdist_task", "gauge", "What a task came to at the last evaluation.", figures)
    yield one("qdist_learning_rate", "Learning rate of the last step.", fold.learning_rate)
    yield one("qdist_gradient_norm", "Global gradient norm of the last step, before clipping.", fold.gradient_norm)
    yield one("qdist_tokens_per_second", "Median of the last 10 steps, all ranks together.", fold.tokens_per_s)
    positions = "The same with padding: positions that were computed."
    yield one("qdist_positions_per_second", positions, fold.positions_per_s)
    yield one("qdist_tokens", "Tokens trained on so far; goes back with the step.", sum(fold.columns.tokens))
    yield one("qdist_padding_ratio", "Of all positions computed, those that held no token.", fold.padding_share)
    yield one("qdist_data_ratio", "Of the last steps' time, what rank 0 spent on making samples.", fold.data_share)
    yield one("qdist_skipped_steps", "Steps whose update was not made, gradients not being finite.", len(fold.skipped))
    yield one("qdist_seconds_left", "Until the last step, at the pace of the last 10.", fold.seconds_left)
    saved = fold.checkpoints[-1][0] if fold.checkpoints else None
    yield one("qdist_checkpoint_step", "Step of the last checkpoint.", saved)
    yield one("qdist_trained_seconds_total", "Time that ranks were there, all launches.", fold.trained_s, "counter")
    yield one("qdist_resumes_total", "Times that the run went on from a checkpoint.", len(fold.resumed), "counter")


def _of_ranks(plan: Plan, fold: RunHistory, pulses: Mapping[int, Heartbeat]) -> Iterator[Metric]:
    """Measured values of each rank, beside the planned ones."""
    # An earlier launch may have had more ranks.
    said = [(number, rank) for number, rank in sorted(fold.ranks.items()) if number < plan.world_size]
    peaks = [({"rank": number}, rank.memory_bytes or None) for number, rank in said]
    yield Metric("qdist_rank_memory_peak_bytes", "gauge", "Peak since the last launch, of its fullest GPU.", peaks)
    expected = [({"rank": rank.rank}, max(budget.total for budget in rank.expected)) for rank in plan.ranks]
    yield Metric("qdist_rank_memory_predicted_bytes", "gauge", "Predicted by the plan, of its fullest GPU.", expected)
    speeds = [({"rank": number}, rank.tokens_per_s) for number, rank in said]
    yield Metric("qdist_rank_tokens_per_second", "gauge", "While busy with its own micro-batches.", speeds)
    steps = [({"rank": number}, rank.last_step) for number, rank in said]
    yield Metric("qdist_rank_step", "gauge", "Last step that the rank has told of.", steps)
    beats = sorted(pulses.items())
    now = [({"rank": number}, pulse.memory_bytes or None) for number, pulse in beats]
    yield Metric("qdist_rank_memory_bytes", "gauge", "Held at its last beat, on all of its GPUs together.", now)
    times = [({"rank": number}, pulse.time) for number, pulse in beats]
    yield Metric("qdist_rank_beat_timestamp_seconds", "gauge", "When the rank last gave a sign of life.", times)
    phases = [
        ({"rank": number, "phase": phase}, float(pulse.phase == phase))
        for number, pulse in beats
        for phase in get_args(Phase)
    ]
    yield Metric("qdist_rank_phase", "gauge", "1 for what the rank was at in its last beat, 0 for the rest.", phases)


def _on_nodes(metrics: Iterable[Metric], nodes: Mapping[int, str]) -> Iterator[Metric]:
    """The same with the name of each rank's node. nodes: by rank."""
    for metric in metrics:
        samples = [({**labels, "node": nodes.get(int(labels["rank"]), "")}, value) for labels, value in metric.samples]
        yield metric._replace(samples=samples)


def _of_nodes(nodes: NodesNow, fold: RunHistory) -> Iterator[Metric]:
    names = dict.fromkeys((member.name for one in nodes.generations for member in one.members), 0.0)
    names |= {member.name: float(member.name not in nodes.down and not nodes.ended) for member in nodes.members}
    up = [({"node": name}, value) for name, value in names.items()]
    yield Metric("qdist_node_up", "gauge", "1 for a node that takes part, 0 for one that is lost or left.", up)
    number = nodes.now.number if nodes.now else None
    yield one("qdist_generation", "Number of the formation of nodes that works.", number)
    lost = "Times that a node was lost, all launches."
    yield one("qdist_nodes_lost_total", lost, len(nodes.absences), "counter")
    twice = "Time of steps that were done again after a restart, all launches."
    yield one("qdist_repeated_seconds_total", twice, fold.repeated_s, "counter")
    without = "Time until ranks were started again after nodes were lost or returned, all launches."
    yield one("qdist_paused_seconds_total", without, nodes.paused_s, "counter")


def one(name: str, meaning: str, value: float | None, kind: Literal["gauge", "counter"] = "gauge") -> Metric:
    """A metric of one value."""
    return Metric(name, kind, meaning, [({}, value)])


def _labels(labels: Mapping[str, str | int]) -> str:
    named = ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items())
    return f"{{{named}}}" if named else ""


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(value)
