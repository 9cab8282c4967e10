"""What in a run needs attention: alarms while it trains, findings in its report."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, NamedTuple

from qdist.core.planning.packing import packs_samples
from qdist.core.planning.placements.registry import layout_of
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.curves import thinned
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.memory_report import memory_of
from qdist.core.telemetry.nodes import generations_in_words, nodes_in_words
from qdist.core.telemetry.report_sections import measured_speed
from qdist.core.telemetry.snapshot import Snapshot, rows
from qdist.core.text import counted, format_bytes, format_count

Kind = Literal[
    "nodes", "stuck", "loss", "skipped", "held-out", "memory", "throttled", "skew", "data", "padding", "speed",
    "events", "resumed", "generations",
]  # fmt: skip

_BEFORE = 10
"""Steps whose mean a loss is compared with; also how many first losses set the scale of a run."""
_JUMP, _JUMP_LEAST = 2.0, 0.1
"""A jump is to this multiple of the mean before it, and by this share of the first losses: small losses are noisy."""
_RISEN, _RISEN_LEAST, _RISEN_STEPS = 1.5, 0.5, 3
"""Training does harm where the mean of the last losses, of this many at least, is this multiple of the first loss and
this much above it."""
_OVERFIT = 1.05
"""The last held-out loss as a multiple of the best."""
_NEAR_LIMIT, _OVER_PLAN = 0.97, 1.05
"""Memory as a share of a GPU's limit, and of the plan."""
_APART, _DATA, _PADDING, _SLOWER = 0.15, 0.05, 0.30, 0.10
_WATCHED = 30
"""Steps for which a monitor keeps showing what happened in one."""
_MOST_NAMED = 8


class RunWarning(NamedTuple):
    """One warning."""

    kind: Kind
    text: str
    """Text without capital and full stop."""

    @property
    def sentence(self) -> str:
        """The text as a sentence of its own."""
        return f"{self.text[:1].upper()}{self.text[1:]}."


class _Span(NamedTuple):
    """The steps asked about."""

    steps: Sequence[int]
    losses: Sequence[float]
    skipped: Sequence[int]
    updates: int
    data_share: float


def find_warnings(seen: Snapshot, *, result: Mapping[str, Any] | None = None, whole: bool = False) -> list[RunWarning]:
    """All warnings, the most urgent first; empty where all is well.

    result: what `result.json` holds. whole: about all steps; otherwise about the last ones.
    """
    fold, span = seen.fold, _all_steps(seen.fold) if whole else _last_steps(seen.fold)
    return [
        *(_alive(seen) if seen.state == "running" else ()),
        *_losses(fold, span, failed=seen.state == "failed"),
        *held_out_warnings(fold.held_out),
        *_over_plan(seen.plan, fold, result),
        *_pace(seen.plan, fold, span, result),
        *([RunWarning("events", f"events were left out: {fold.unread}")] if fold.unread else ()),
        *(_resumes(fold) if whole else ()),
        *(_generations(seen) if whole else ()),
    ]


def _last_steps(fold: RunHistory) -> _Span:
    columns, count = fold.columns, _WATCHED + _BEFORE
    steps = columns.step[-count:]
    skipped = [step for step in fold.skipped[-count:] if steps and step >= steps[0]]
    return _Span(steps, columns.loss[-count:], skipped, len(steps), fold.data_share or 0.0)


def _all_steps(fold: RunHistory) -> _Span:
    columns, seconds = fold.columns, sum(fold.columns.seconds)
    share = sum(columns.data_s) / seconds if seconds else 0.0
    return _Span(columns.step, columns.loss, fold.skipped, len(columns), share)


def _alive(seen: Snapshot) -> Iterator[RunWarning]:
    """Warnings of lost nodes, stuck ranks, memory near its limit and throttled GPUs: only while a run is running."""
    if seen.nodes:
        yield from (RunWarning("nodes", sentence) for sentence in nodes_in_words(seen.nodes, seen.now))
    yield from (RunWarning("stuck", trouble) for trouble in seen.troubles)
    for row in rows(seen):
        held = max(row.now_bytes or 0, row.peak_bytes or 0)
        if row.limit_bytes and held >= _NEAR_LIMIT * row.limit_bytes:
            yield RunWarning(
                "memory",
                f"{row.label} is at {format_bytes(held)} of {format_bytes(row.limit_bytes)} "
                f"({held / row.limit_bytes:.0%}): it may run out; a smaller micro_batch needs less",
            )
        if row.card and row.card.throttled:
            heat = "" if row.card.temperature_c is None else f" ({row.card.temperature_c} C)"
            yield RunWarning("throttled", f"GPU {row.gpu} of rank {row.rank} throttles: {row.card.throttled}{heat}")


def _losses(fold: RunHistory, span: _Span, *, failed: bool) -> Iterator[RunWarning]:
    if not math.isfinite(sum(span.losses)):
        bad = [step for step, loss in zip(span.steps, span.losses, strict=True) if not math.isfinite(loss)]
        advice = "" if failed else ": try a smaller optim.lr"  # what to try after a failure, its error says
        yield RunWarning("loss", f"the loss is NaN or infinite at {_named(bad)}{advice}")
    if (risen := _risen(fold.columns.loss)) is not None:
        first, last = risen
        yield RunWarning(
            "loss", f"the loss has risen from {first:.3f} to {last:.3f}: training does harm; try a smaller optim.lr"
        )
    if jumps := _jumps(span, fold.columns.loss[:_BEFORE]):
        mean, loss, step = jumps[-1]
        others = f", and before at {_named([step for *_, step in jumps[:-1]])}" if len(jumps) > 1 else ""
        yield RunWarning("loss", f"the loss jumped from {mean:.3f} to {loss:.3f} at step {step:,}{others}")
    if span.skipped:
        of_last = "the last " if span.updates < len(fold.columns) else ""
        yield RunWarning(
            "skipped",
            f"{len(span.skipped):,} of {of_last}{span.updates:,} updates were skipped because the gradients were NaN "
            f"or infinite: {_named(span.skipped)}",
        )


def _risen(losses: Sequence[float]) -> tuple[float, float] | None:
    """(first loss, mean of the last ones) if the last are so much higher that training has done harm."""
    last = [loss for loss in losses[max(1, len(losses) - _BEFORE) :] if math.isfinite(loss)]
    if len(last) < _RISEN_STEPS or not math.isfinite(losses[0]):
        return None
    mean = fmean(last)
    return (losses[0], mean) if mean > _RISEN * losses[0] and mean > losses[0] + _RISEN_LEAST else None


def _jumps(span: _Span, first_losses: Sequence[float]) -> list[tuple[float, float, int]]:
    """(mean of the preceding losses, loss, step) of each loss far above them."""
    curve = thinned("loss", "raw", span.steps, span.losses)  # a jump is among the points that are kept
    points = [(step, loss) for step, loss in zip(curve.x, curve.y, strict=True) if math.isfinite(loss)]
    finite = [loss for loss in first_losses if math.isfinite(loss)]
    least = _JUMP_LEAST * fmean(finite) if finite else math.inf
    found = []
    for index in range(_BEFORE, len(points)):
        step, loss = points[index]
        mean = fmean(before for _, before in points[index - _BEFORE : index])
        if loss > _JUMP * mean and loss - mean > least:
            found.append((mean, loss, step))
    return found


def held_out_warnings(held_out: Sequence[tuple[int, float]]) -> Iterator[RunWarning]:
    """Whether evaluations, each (step, loss), say that training went on for too long or did harm from the start."""
    points = sorted(point for point in held_out if math.isfinite(point[1]))
    if len(points) < 2:
        return
    (best_step, best), (first_step, first), (last_step, last) = min(points, key=_loss), points[0], points[-1]
    if best_step and last > _OVERFIT * best:
        yield RunWarning(
            "held-out",
            f"the held-out loss was best at step {best_step:,} ({best:.4g}) and rose to {last:.4g} at step "
            f"{last_step:,}: later steps memorized the training data; `qdist gather --checkpoint best` takes "
            "the better adapter",
        )
    elif first_step == 0 and round(last, 3) > round(first, 3):  # as shown
        yield RunWarning(
            "held-out",
            f"the held-out loss rose from {first:.4g} before training to {last:.4g} at step {last_step:,}: this "
            "adapter does harm; try a smaller --set optim.lr",
        )


def _loss(point: tuple[int, float]) -> float:
    return point[1]


def _over_plan(plan: Plan, fold: RunHistory, result: Mapping[str, Any] | None) -> Iterator[RunWarning]:
    memory = memory_of(plan, fold, result)
    over = [own for own in memory if own.measured_bytes > _OVER_PLAN * own.predicted_bytes > 0]
    if over:
        worst = max(over, key=lambda own: own.measured_bytes / own.predicted_bytes)
        share = _percent(worst.measured_bytes / worst.predicted_bytes - 1)
        others = f", and {counted(len(over) - 1, 'other')} over plan" if len(over) > 1 else ""
        yield RunWarning(
            "memory",
            f"memory was {share} over plan on {worst.label}: {format_bytes(worst.measured_bytes)} instead of "
            f"{format_bytes(worst.predicted_bytes)}{others}",
        )


def _pace(plan: Plan, fold: RunHistory, span: _Span, result: Mapping[str, Any] | None) -> Iterator[RunWarning]:
    if fold.skew and fold.skew[1] > _APART:
        rank, share = fold.skew
        yield RunWarning(
            "skew",
            f"ranks drift apart: rank {rank}'s passes take {_percent(share)} longer than the fastest's, which wait",
        )
    if span.data_share > _DATA:
        yield RunWarning("data", f"data stalls: making samples took {_percent(span.data_share)} of the steps' time")
    if (padding := fold.padding_share or 0.0) > _PADDING:
        yield RunWarning(
            "padding",
            f"{_percent(padding)} of the computed positions are padding: {_fuller(plan)} would waste less",
        )
    speed, planned = measured_speed(fold, result), plan.tokens_per_second
    if speed and speed < (1 - _SLOWER) * planned and len(fold.columns) >= _BEFORE:  # the first steps compile
        yield RunWarning(
            "speed",
            f"training runs at {format_count(speed)} tokens/s, {_percent(1 - speed / planned)} slower than planned",
        )


def _fuller(plan: Plan) -> str:
    """What would waste less on padding."""
    if plan.packed:
        return "another micro_batch, or a larger global_batch,"
    if layout_of(plan).packs and not packs_samples(plan.facts):
        return "pack=true"
    return "a smaller micro_batch, or samples of like length in one,"


def _resumes(fold: RunHistory) -> Iterator[RunWarning]:
    if fold.resumed:
        steps = [step for step, _ in fold.resumed]
        yield RunWarning("resumed", f"the run was resumed {counted(len(steps), 'time')}: from {_named(steps)}")


def _generations(seen: Snapshot) -> Iterator[RunWarning]:
    if seen.nodes and (words := generations_in_words(seen.nodes, seen.fold)):
        yield RunWarning("generations", words)


def _named(steps: Sequence[int]) -> str:
    """'step 4', 'steps 4, 9 and 3 more'."""
    shown = ", ".join(f"{step:,}" for step in steps[:_MOST_NAMED])
    more = f" and {len(steps) - _MOST_NAMED:,} more" if len(steps) > _MOST_NAMED else ""
    return f"step{'s' if len(steps) > 1 else ''} {shown}{more}"


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1}f} %"
