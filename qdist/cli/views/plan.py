"""A plan, what a launch would do, and what a finished run was predicted to take and took, as lines for a person."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qdist.cli.views.model_parts import adapter_in_words, experts_lines, kept_lines, weights_in_words
from qdist.cli.views.text import loading, terminal_width
from qdist.core.planning.disk import storage
from qdist.core.planning.fill import has_padding
from qdist.core.planning.memory import MemoryBudget
from qdist.core.planning.placements.base import nodes_in_words, unit_of
from qdist.core.planning.placements.registry import layout_of
from qdist.core.planning.plan import Alternative, Plan, RankPlan
from qdist.core.planning.sources import epoch_in_words, sources_in_words
from qdist.core.telemetry.memory_report import shown_error
from qdist.core.text import (
    counted,
    first_few,
    fitted,
    format_bytes,
    format_count,
    format_delay,
    format_duration,
    format_rate,
)
from qdist.host.launch.prepare import Preview
from qdist.host.launch.survey import Work

_MARGIN = " " * 9
"""Indent of a line that continues the named line above it."""
_MOST_NUMBERS = 8
"""GPUs or ranks that are named of those that hold the same."""
_SHORT_S = 0.1
"""Seconds a step below which milliseconds are shown."""
_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "gathers", "context", "margin")


def plan_lines(plan: Plan, *, notes: tuple[str, ...] = ()) -> list[str]:
    """What will run, where, how fast, what each GPU will hold, and why it is not done otherwise."""
    spec = plan.spec
    return [
        f"model    {spec.model}: {format_count(plan.facts.parameters)} parameters, {_weights(plan)}, "
        f"{plan.compute_dtype} arithmetic" + (f", products in {spec.compute}" if spec.compute else ""),
        *experts_lines(plan.facts),
        f"adapter  {plan.adapter.title} {spec.lora}: {adapter_in_words(plan)}",
        *kept_lines(plan),
        f"ranks    {_where(plan)}",
        f"layout   {layout_of(plan).in_words(plan)}",
        f"engine   {_engine(plan)}, {plan.optimizer}",
        f"batch    {spec.batch} = {layout_of(plan).batch_in_words(plan)} of up to {plan.seq_len} tokens"
        + _checkpointing(plan)
        + (", Liger kernels" if plan.liger else ""),
        *_data(plan),
        f"steps    {plan.steps:,}"
        + (f" over {epoch_in_words(plan.data)}, {plan.data.held_out_samples:,} held out" if plan.data else ""),
        *_speed(plan),
        *_network(plan),
        *_memory(plan),
        *_lost(plan),
        *(f"note     {note}" for note in (*notes, *plan.notes)),
    ]


def _data(plan: Plan) -> Iterator[str]:
    """How many samples, of which format, how they became text, and what each of several sources gives."""
    data = plan.data
    if data is None:
        return
    lines = list(sources_in_words(data))
    if data.wording is not None:
        lines.insert(0, f"{counted(data.records or data.samples, 'record')}, {data.wording}")
    yield from (f"{_MARGIN if number else 'data     '}{line}" for number, line in enumerate(lines))


def shown(lines: Sequence[str]) -> str:
    """Lines for standard output, fitted to its width if it is a terminal."""
    width = terminal_width()
    return "\n".join(lines if width is None else wrapped(lines, width))


def wrapped(lines: Sequence[str], width: int) -> list[str]:
    """The same, broken between words where a terminal is narrower; what follows stands below the words, not the name.

    Rows of `not` are a table, and are left to the terminal.
    """
    found: list[str] = []
    for line in lines:
        if line.startswith(("not ", _MARGIN)) and "  " in line.strip():
            found.append(line)
        else:
            found += fitted(line, width, margin=len(_MARGIN))
    return found


def _where(plan: Plan) -> str:
    if plan.device == "cpu":
        threads = counted(plan.threads_per_rank, "thread")
        where = f" on {nodes_in_words(plan)}" if plan.nodes else ""
        return f"{counted(plan.world_size, 'CPU process', 'es')} of {threads}{where}: no GPU here"
    return nodes_in_words(plan) if plan.nodes else layout_of(plan).gpus_in_words


def _network(plan: Plan) -> Iterator[str]:
    """What a step sends between nodes, and the time that this adds to it."""
    if plan.network is None:
        return
    network, seconds = plan.network, plan.network_seconds
    sent = f"a node sends {format_bytes(plan.network_bytes)} a step, which adds {_step(seconds)}"
    if plan.tokens_per_second:
        sent += f", {100 * seconds * plan.tokens_per_second / plan.step_tokens:.2g} % of it"
    rate, delay = format_rate(network.bytes_s), format_delay(network.latency_s)
    yield f"network  {rate}, {delay} ({network.source}): {sent}"


def _step(seconds: float) -> str:
    """Seconds of a step, or of a part of one."""
    if seconds < _SHORT_S:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 60 else format_duration(seconds)


def _checkpointing(plan: Plan) -> str:
    if not plan.checkpointing:
        return ""
    every = plan.checkpointed_layers == plan.facts.layer_count
    return ", checkpointing" + ("" if every else f" {plan.checkpointed_layers} of {plan.facts.layer_count} layers")


def _speed(plan: Plan) -> Iterator[str]:
    if plan.tokens_per_second:
        took = _step(plan.step_tokens / plan.tokens_per_second)
        speed = f"{format_count(plan.tokens_per_second)} tokens/s"
        if has_padding(plan.useful_share):
            all_of_them = format_count(plan.positions_per_second)
            speed = f"{format_count(plan.tokens_per_second)} useful tokens/s ({all_of_them} with padding)"
        yield f"speed    {speed} predicted, {took} a step"


def _memory(plan: Plan) -> Iterator[str]:
    """Peak memory of each GPU, equal GPUs grouped together."""
    held: dict[MemoryBudget, list[int]] = {}
    for rank in plan.ranks:
        numbers = rank.gpus if rank.gpus and not plan.nodes else (rank.rank,)
        for number, budget in zip(numbers, rank.expected, strict=True):
            held.setdefault(budget, []).append(number)
    unit = unit_of(plan)
    named = "rank" if plan.nodes else unit  # GPUs are numbered on each node
    for index, (budget, numbers_of_it) in enumerate(held.items()):
        several = first_few([str(number) for number in numbers_of_it], most=_MOST_NUMBERS)
        where = f"a {unit}" if len(held) == 1 else f"on {named} {several}"
        yield (
            f"{'' if index else 'memory':8} {format_bytes(budget.required)} {where}"
            + (
                f", and {format_bytes(budget.pageable)} of optimizer state where there is room"
                if budget.pageable
                else ""
            )
        )
        parts = (f"{name} {format_bytes(getattr(budget, name))}" for name in _PARTS if getattr(budget, name))
        yield f"         at the peak: {', '.join(parts)}"
    yield f"load     at most {format_bytes(plan.load_peak_bytes)} a {unit} while the backbone is loaded"


def _lost(plan: Plan) -> Iterator[str]:
    """A row per other layout: its speed and memory, and why it lost."""
    for index, other in enumerate(plan.alternatives):
        speed = f"{format_count(other.tokens_per_second)} tok/s" if other.tokens_per_second else ""
        needed = format_bytes(other.required_bytes) if other.required_bytes else ""
        yield f"{'' if index else 'not':8} {_named(other, plan):24} {speed:>12} {needed:>9}  {other.reason}"


def _named(other: Alternative, plan: Plan) -> str:
    """Name of the layout; if the winner or another row has the same, with what distinguishes it."""
    how = f"{other.placement} {other.schedule}" if other.schedule else other.placement
    named = f"{how}, {other.groups} x {other.gpus_per_group}"
    rows: list[Plan | Alternative] = [plan, *plan.alternatives]
    alike = [own for own in rows if own is not other and _grid(own) == _grid(other)]
    if any((own.engine, own.zero_stage) != (other.engine, other.zero_stage) for own in alike):
        return f"{named}, {_state(other.engine, other.zero_stage)}"
    return f"{named}, all on GPU" if plan in alike and plan.offloaded_layers else named


def _grid(own: Plan | Alternative) -> tuple[object, ...]:
    return own.placement, own.schedule, own.groups, own.gpus_per_group


def _state(engine: str, zero_stage: int) -> str:
    """Which ranks keep the adapter's state."""
    return f"ZeRO-{zero_stage}" if engine == "deepspeed" else "torch"


def _weights(plan: Plan) -> str:
    is_mxfp4 = plan.packing is not None and plan.packing.type == "mxfp4"
    return weights_in_words(plan.spec, plan.source.gptq, mxfp4=is_mxfp4)


def _engine(plan: Plan) -> str:
    if plan.engine == "torch":
        return "torch" if plan.world_size > 1 else "torch, one rank"
    return f"DeepSpeed ZeRO-{plan.zero_stage}" + (" with CPU offload" if plan.spec.zero.offload == "cpu" else "")


_DONE = {"fetch": "fetched", "convert": "converted", "pack": "packed", "tokenize": "tokenized"}


def preview_lines(preview: Preview) -> list[str]:
    """The plan, what comes before its ranks, and what the run would leave on the disk."""
    return [*_plan(preview), *map(_work, preview.work), *_disk(preview)]


def _plan(preview: Preview) -> list[str]:
    if preview.job is None:
        return ["plan     known once the model is fetched: only then its shape is"]
    lines = plan_lines(preview.job.plan, notes=preview.job.notes)
    return lines if preview.knows_steps else [line for line in lines if not line.startswith("steps")]


def _work(work: Work) -> str:
    size = format_bytes(work.size_bytes) if work.size_bytes else ""
    if work.there:
        return f"{_DONE[work.action]} already: {work.there}" + (f", {size}" if work.action == "tokenize" else "")
    named = f"would {work.action:<9}{work.what}"
    if work.action == "fetch":
        return f"{named} from the hub ({f'about {size} in 16 bits' if size else 'only the hub knows its size'})"
    if work.action == "tokenize":
        return f"{named}, in {work.folder}"
    return f"{named} to {work.into}, {size or 'as large as it turns out'}, in {work.folder}"


def _disk(preview: Preview) -> Iterator[str]:
    if preview.job is None:
        yield f"run      {preview.run.path}, not created"
        return
    takes = storage(preview.job.plan)
    several = counted(takes.most_checkpoints, "checkpoint")
    yield (
        f"disk     at most {several} of {format_bytes(takes.checkpoint)} and an adapter of "
        f"{format_bytes(takes.adapter)} in {preview.run.path}"
    )
    yield f"run      {preview.run.path}, not {'changed' if preview.run.exists() else 'created'}; its launch.sh:"


Row = tuple[str, str, str, str]
"""(what, predicted, measured, error)."""

_ALIKE = 0.02


class _Memory(NamedTuple):
    label: str
    predicted: int
    measured: int


def outcome_rows(plan: Plan, result: dict[str, Any]) -> list[Row]:
    """Peak memory of each GPU, or of the fullest where all are alike; on GPUs, of loading too, and tokens/s.

    result: what `result.json` holds. Errors are as `prediction.MEANING` says.
    """
    found = _memories(plan, result)
    shown = found
    if len(found) > 2 and _alike(found):
        fullest = max(found, key=lambda memory: memory.measured)
        shown = [fullest._replace(label=f"memory of the fullest of {len(found)} {unit_of(plan)}s")]
    rows = [_row(memory.label, memory.predicted, memory.measured, format_bytes) for memory in shown]
    if plan.device == "cpu":
        return rows
    load = max((peak.get("load", 0) for of_rank in result["peaks"] for peak in of_rank), default=0)
    if load:
        rows.append(_row("memory while loading", plan.load_peak_bytes, load, format_bytes))
    if speed := result["tokens_per_s"]["measured"]:
        rows.append(_row("tokens/s", plan.tokens_per_second, speed, format_count))
    positions = result.get("positions_per_s", {}).get("measured")
    if speed and positions and has_padding(speed / positions):
        rows[-1] = ("useful tokens/s", *rows[-1][1:])
        rows.append(_row("tokens/s with padding", plan.positions_per_second, positions, format_count))
    return rows


def start_line(result: dict[str, Any]) -> str:
    """'first step after 42 s (imports 5.1, weights 31.0); loading 31 s, 33 GiB read at 1 GB/s'; empty if unknown."""
    first = result["start_seconds"]["first_step"]
    if first is None:
        return ""
    own = result.get("loading", {"seconds": 0.0, "read_bytes": 0})
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.get("starting", {}).items())
    of_these = f" ({phases})" if phases else ""
    return f"first step after {format_duration(first)}{of_these}; loading {loading(own['seconds'], own['read_bytes'])}"


def _of_node(plan: Plan, rank: RankPlan) -> str:
    """' of b': GPUs are numbered on their nodes."""
    return f" of {plan.nodes[rank.node].name}" if rank.gpus and len(plan.nodes) > 1 else ""


def _memories(plan: Plan, result: dict[str, Any]) -> list[_Memory]:
    return [
        _Memory(
            f"memory of {unit_of(plan)} {rank.gpus[position] if rank.gpus else rank.rank}{_of_node(plan, rank)}",
            expected.total,
            peak["allocated"] + peak["context"],
        )
        for rank, peaks in zip(plan.ranks, result["peaks"], strict=True)
        for position, (expected, peak) in enumerate(zip(rank.expected, peaks, strict=True))
    ]


def _alike(found: list[_Memory]) -> bool:
    return all(
        max(values) - min(values) <= _ALIKE * max(values)
        for values in ([memory.predicted for memory in found], [memory.measured for memory in found])
    )


def _row(label: str, predicted: float, measured: float, shown: Any) -> Row:
    if not predicted:
        return label, "-", shown(measured), ""
    return label, shown(predicted), shown(measured), shown_error(predicted, measured)
