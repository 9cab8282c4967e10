"""What of a run deserves a second look, in words."""

import math
from collections.abc import Iterator, Sequence

from qdist.core.alarms import PADDED, STALLED
from qdist.core.curves import Chart
from qdist.core.fold import Fold
from qdist.core.jumps import BEFORE, first_losses, jumped_from
from qdist.core.memory_parts import Parts
from qdist.core.plan import Plan
from qdist.core.units import counted, format_bytes, format_count

_OVER_PLAN, _SKEW, _SLOWER = 0.05, 0.05, 0.10
_WORSE = 1.05
_MOST_NAMED = 8


def findings(
    plan: Plan, fold: Fold, charts: Sequence[Chart], memory: Sequence[Parts], tokens_per_s: float | None
) -> tuple[str, ...]:
    """One sentence or two for each; empty where there is nothing to say.

    charts: as `qdist.core.curves.charts` gives them. tokens_per_s: measured.
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
