"""What of a run needs a person: alarms while it trains, findings in its report."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

from qdist.core.planning.plan import Plan
from qdist.core.telemetry.curves import Chart
from qdist.core.telemetry.history import Fold
from qdist.core.telemetry.memory_report import Parts
from qdist.core.telemetry.snapshot import Snapshot, rows
from qdist.core.text import counted, format_bytes, format_count

BEFORE = 10
"""Steps whose mean a loss is held against; the loss of the first as many is the run's measure."""
_RISEN, _RISEN_LEAST, _ENOUGH = 1.5, 0.5, 3
"""Training has done harm where the last losses, at least so many, are so many times the first, and so much above it."""
_TIMES, _LEAST = 2.0, 0.1
"""A jump is to this many times that mean, and by this share of the first losses: small losses are noisy."""


def first_losses(losses: Sequence[float]) -> float:
    """The mean of a run's first losses; NaN while there is none that is a number."""
    finite = [loss for loss in losses[:BEFORE] if math.isfinite(loss)]
    return fmean(finite) if finite else math.nan


def risen_from(losses: Sequence[float]) -> tuple[float, float] | None:
    """(first loss, mean of the last ones) where the last are so much higher that training has done harm."""
    last = [loss for loss in losses[max(1, len(losses) - BEFORE) :] if math.isfinite(loss)]
    if len(last) < _ENOUGH or not math.isfinite(losses[0]):
        return None
    mean = fmean(last)
    return (losses[0], mean) if mean > _RISEN * losses[0] and mean > losses[0] + _RISEN_LEAST else None


def jumped_from(before: Sequence[float], loss: float, first: float) -> float | None:
    """The mean of the losses `before` that `loss` jumped away from; None where it did not.

    first: what `first_losses` gave.
    """
    finite = [one for one in before if math.isfinite(one)]
    if not finite:
        return None
    mean = fmean(finite)
    return mean if loss > _TIMES * mean and loss - mean > _LEAST * first else None


NEAR_LIMIT, APART, STALLED, PADDED = 0.97, 0.15, 0.05, 0.30
_WATCHED = 30
"""Last steps in which a jump is still told."""


def warnings(snapshot: Snapshot) -> list[str]:
    """A sentence each, the most urgent first; empty where all is well."""
    live = snapshot.state == "running"
    return [
        *(snapshot.troubles if live else ()),
        *_loss(snapshot),
        *(_nearly_full(snapshot) if live else ()),
        *(_cards(snapshot) if live else ()),
        *_pace(snapshot),
        *([snapshot.fold.unread] if snapshot.fold.unread else ()),
    ]


def _loss(snapshot: Snapshot) -> Iterator[str]:
    columns = snapshot.fold.columns
    steps, losses = columns.step[-_WATCHED - BEFORE :], columns.loss[-_WATCHED - BEFORE :]
    if losses and not math.isfinite(losses[-1]):
        bad = len(losses) - 1
        while bad and not math.isfinite(losses[bad - 1]):
            bad -= 1
        since = "at" if bad == len(losses) - 1 else "since"
        # What to try in a run that has ended, its error says.
        advice = ": stop and try a smaller optim.lr" if snapshot.state == "running" else ""
        yield f"the loss is not a number {since} step {steps[bad]:,}{advice}"
    if (risen := risen_from(columns.loss)) is not None:
        yield f"the loss has risen from {risen[0]:.3f} to {risen[1]:.3f}: training does harm; try a smaller optim.lr"
    first = first_losses(columns.loss)
    for index in range(len(losses) - 1, BEFORE - 1, -1):
        mean = jumped_from(losses[index - BEFORE : index], losses[index], first)
        if mean is not None:
            yield f"the loss jumped from {mean:.3f} to {losses[index]:.3f} at step {steps[index]:,}"
            break
    recent = [step for step in snapshot.fold.skipped[-_WATCHED:] if steps and step >= steps[0]]
    if recent:
        yield f"{len(recent)} of the last {len(steps)} updates were skipped: their gradients were NaN or infinite"


def _nearly_full(snapshot: Snapshot) -> Iterator[str]:
    for row in rows(snapshot):
        held = max(row.now_bytes or 0, row.peak_bytes or 0)
        if row.limit_bytes and held >= NEAR_LIMIT * row.limit_bytes:
            yield (
                f"{row.label} is at {format_bytes(held)} of {format_bytes(row.limit_bytes)} "
                f"({held / row.limit_bytes:.0%}): it may run out; a smaller micro_batch needs less"
            )


def _cards(snapshot: Snapshot) -> Iterator[str]:
    for row in rows(snapshot):
        if row.card and row.card.throttled:
            heat = "" if row.card.temperature_c is None else f" ({row.card.temperature_c} C)"
            yield f"GPU {row.gpu} of rank {row.rank} throttles: {row.card.throttled}{heat}"


def _pace(snapshot: Snapshot) -> Iterator[str]:
    fold = snapshot.fold
    if fold.skew and fold.skew[1] > APART:
        rank, share = fold.skew
        yield f"ranks drift apart: rank {rank}'s passes take {share:.0%} longer than the fastest's, which wait"
    if (stalled := fold.data_share or 0.0) > STALLED:
        yield f"data stalls: making samples took {stalled:.0%} of the last steps' time"
    if (padding := fold.padding_share or 0.0) > PADDED:
        yield f"{padding:.0%} of the computed positions are padding: a smaller micro_batch wastes less"


_OVER_PLAN, _SKEW, _SLOWER = 0.05, 0.05, 0.10
_WORSE = 1.05
_MOST_NAMED = 8


def findings(
    plan: Plan, fold: Fold, charts: Sequence[Chart], memory: Sequence[Parts], tokens_per_s: float | None
) -> tuple[str, ...]:
    """One sentence or two for each; empty where there is nothing to say.

    charts: as `qdist.core.telemetry.curves.charts` gives them. tokens_per_s: measured.
    """
    return (
        *_numbers(fold),
        *_spikes(charts),
        *_held_out(fold),
        *_memory(memory),
        *_time(plan, fold, tokens_per_s),
        *_restarts(fold),
        *([f"{fold.unread}."] if fold.unread else ()),
    )


def _numbers(fold: Fold) -> Iterator[str]:
    if fold.skipped:
        yield (
            f"{len(fold.skipped):,} of {len(fold.columns):,} updates were skipped because the gradients were NaN or "
            f"infinite: {_named(fold.skipped)}."
        )
    if math.isnan(sum(fold.columns.loss)):
        bad = [step for step, loss in zip(fold.columns.step, fold.columns.loss, strict=True) if math.isnan(loss)]
        yield f"The loss was not a number in {counted(len(bad), 'step')}: {_named(bad)}. Try a smaller optim.lr."


def _spikes(charts: Sequence[Chart]) -> Iterator[str]:
    curve = next((chart.series[0] for chart in charts if chart.key == "loss"), None)
    if curve is None:
        return
    points = [(step, loss) for step, loss in zip(curve.x, curve.y, strict=True) if math.isfinite(loss)]
    losses = [loss for _, loss in points]
    first = first_losses(losses)
    found = [
        points[index][0]
        for index in range(BEFORE, len(points))
        if jumped_from(losses[index - BEFORE : index], losses[index], first) is not None
    ]
    if found:
        yield f"The loss jumped to more than twice the mean of the steps before: {_named(found)}."


def _held_out(fold: Fold) -> Iterator[str]:
    points = [point for point in fold.held_out if math.isfinite(point[1])]
    if not points:
        return
    (best_step, best), (last_step, last) = min(points, key=lambda point: point[1]), max(points)
    if last > _WORSE * best and best_step == 0:
        yield (
            f"The held-out loss rose from {best:.4g} before training to {last:.4g} at step {last_step:,}: the adapter "
            "does harm. Try a smaller optim.lr."
        )
    elif last > _WORSE * best:
        yield (
            f"The held-out loss was best at step {best_step:,} ({best:.4g}) and rose to {last:.4g} at step "
            f"{last_step:,}: later steps learnt the training data by heart. `qdist gather --checkpoint best` takes the "
            "better adapter."
        )


def _memory(memory: Sequence[Parts]) -> Iterator[str]:
    over = [own for own in memory if own.measured_bytes > (1 + _OVER_PLAN) * own.predicted_bytes > 0]
    if over:
        worst = max(over, key=lambda own: own.measured_bytes / own.predicted_bytes)
        share = _percent(worst.measured_bytes / worst.predicted_bytes - 1)
        others = f", and {counted(len(over) - 1, 'other')} over plan" if len(over) > 1 else ""
        yield (
            f"Memory was {share} over plan on {worst.label}: {format_bytes(worst.measured_bytes)} instead of "
            f"{format_bytes(worst.predicted_bytes)}{others}."
        )


def _time(plan: Plan, fold: Fold, tokens_per_s: float | None) -> Iterator[str]:
    if (padding := fold.padding_share or 0.0) > PADDED:
        yield (
            f"{_percent(padding)} of the computed positions were padding. Samples of like length in a micro-batch, or "
            "a smaller micro_batch, would waste less."
        )
    seconds = sum(fold.columns.seconds)
    if seconds and (data := sum(fold.columns.data_s) / seconds) > STALLED:
        yield f"Making samples took {_percent(data)} of the time: rank 0 waited for its data."
    if fold.skew and fold.skew[1] > _SKEW:
        yield (
            f"The ranks are apart: rank {fold.skew[0]} takes {_percent(fold.skew[1])} longer for its passes than the "
            "fastest, which waits for it."
        )
    if tokens_per_s and tokens_per_s < (1 - _SLOWER) * plan.tokens_per_second:
        yield (
            f"Training ran at {format_count(tokens_per_s)} tokens/s, "
            f"{_percent(1 - tokens_per_s / plan.tokens_per_second)} slower than planned."
        )


def _restarts(fold: Fold) -> Iterator[str]:
    if fold.resumed:
        steps = [step for step, _ in fold.resumed]
        yield f"The run was resumed {counted(len(steps), 'time')}: from {_named(steps)}."


def _named(steps: Sequence[int]) -> str:
    """'step 4', 'steps 4, 9 and 3 more'."""
    shown = ", ".join(f"{step:,}" for step in steps[:_MOST_NAMED])
    more = f" and {len(steps) - _MOST_NAMED:,} more" if len(steps) > _MOST_NAMED else ""
    return f"step{'s' if len(steps) > 1 else ''} {shown}{more}"


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1}f} %"
