"""A run's curves for a chart: few enough points to draw, and no spike lost among many steps."""

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

import msgspec

from qdist.core.telemetry.history import RunHistory

MOST_POINTS = 2000
"""Most points of one curve; a screen is no wider."""
_LEAST_WINDOW, _WINDOWS = 10, 100
"""Steps that are smoothed together: this many, or this part of a long run."""
_MOST_MARKS = 500

Style = Literal["raw", "line", "points"]


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One curve. `x` are steps, ascending; a `y` that is NaN is a gap, and null in JSON."""

    name: str
    style: Style
    x: list[int]
    y: list[float]


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """Curves over the same axis of steps."""

    key: str
    title: str
    series: tuple[Series, ...]


class Marks(msgspec.Struct, frozen=True, kw_only=True):
    """Steps to mark on a chart: checkpoints and resumes."""

    checkpoints: list[int]
    resumes: list[int]


def charts(fold: RunHistory) -> tuple[Chart, ...]:
    """Loss, learning rate, gradient norm and tokens/s; empty before the first step."""
    columns = fold.columns
    if not len(columns):
        return ()
    smoothed_x, smoothed_y = smoothed(columns.step, columns.loss)
    held_out = sorted(fold.held_out)
    loss = [
        thinned("loss", "raw", columns.step, columns.loss),
        Series(name="smoothed", style="line", x=smoothed_x, y=_rounded(smoothed_y)),
    ]
    if held_out:
        loss.append(_points("held-out", held_out))
    return (
        Chart(key="loss", title="Loss", series=tuple(loss)),
        *_tasks(fold),
        _single("speed", "Tokens/s", "tokens/s", columns.step, tokens_per_s(fold)),
        _single("gradient", "Gradient norm", "gradient norm", columns.step, columns.gradient_norm),
        _single("rate", "Learning rate", "learning rate", columns.step, columns.learning_rate),
    )


def _tasks(fold: RunHistory) -> Iterator[Chart]:
    """A chart for each task that evaluations measured."""
    for task, points in fold.tasks.items():
        yield Chart(key=task, title=task, series=(_points(task, sorted(points)),))


def _points(name: str, points: Sequence[tuple[int, float]]) -> Series:
    steps, values = [step for step, _ in points], [value for _, value in points]
    return Series(name=name, style="points", x=steps, y=_rounded(values))


def marks(fold: RunHistory) -> Marks:
    """Checkpoints and resumes; of very many checkpoints, evenly chosen ones."""
    steps = sorted({step for step, _ in fold.checkpoints})
    return Marks(checkpoints=evenly(steps, _MOST_MARKS), resumes=sorted({step for step, _ in fold.resumed}))


def tokens_per_s(fold: RunHistory) -> "array[float]":
    """Tokens/s of each step; NaN if a step has no time."""
    columns = fold.columns
    return array(
        "d",
        [
            tokens / seconds if seconds > 0 else math.nan
            for tokens, seconds in zip(columns.tokens, columns.seconds, strict=True)
        ],
    )


def thinned(
    name: str, style: Style, steps: Sequence[int], values: Sequence[float], *, most: int = MOST_POINTS
) -> Series:
    """The curve itself, or of each of `most` / 2 equal stretches its lowest and its highest point.

    A stretch without a single number stays as a gap; where some of a stretch are NaN, the others are shown.
    """
    if len(values) <= most:
        return Series(name=name, style=style, x=list(steps), y=_rounded(values))
    kept: list[int] = []
    buckets = most // 2
    for bucket in range(buckets):
        start, end = bucket * len(values) // buckets, (bucket + 1) * len(values) // buckets
        part = values[start:end]
        if not math.isfinite(sum(part)):  # NaN has no order
            finite = [value for value in part if math.isfinite(value)]
            if not finite:
                kept.append(start)
                continue
            low, high = min(finite), max(finite)
        else:
            low, high = min(part), max(part)
        kept += sorted({start + part.index(low), start + part.index(high)})
    return Series(name=name, style=style, x=[steps[index] for index in kept], y=_rounded([values[i] for i in kept]))


def smoothed(
    steps: Sequence[int], values: Sequence[float], *, most: int = MOST_POINTS // 2
) -> tuple[list[int], list[float]]:
    """At most `most` (step, mean of the steps up to it that are numbers); the window is a hundredth of the run."""
    window = max(_LEAST_WINDOW, len(values) // _WINDOWS)
    whole = math.isfinite(sum(values))
    sums = [0.0, *accumulate(values if whole else [value if math.isfinite(value) else 0.0 for value in values])]
    counts = range(len(sums)) if whole else [0, *accumulate(map(math.isfinite, values))]
    at = evenly(range(len(values)), most)
    means = [_mean(sums, counts, max(0, index + 1 - window), index + 1) for index in at]
    return [steps[index] for index in at], means


def evenly(items: Sequence[int], most: int) -> list[int]:
    """At most `most` items, evenly spaced, the first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[index * (len(items) - 1) // (most - 1)] for index in range(most)]


def value_at(series: Series, step: int) -> float:
    """The value at the last point up to a step; NaN before the first."""
    index = bisect_right(series.x, step) - 1
    return series.y[index] if index >= 0 else math.nan


def _single(key: str, title: str, name: str, steps: Sequence[int], values: Sequence[float]) -> Chart:
    return Chart(key=key, title=title, series=(thinned(name, "line", steps, values),))


def _mean(sums: Sequence[float], counts: Sequence[int], start: int, end: int) -> float:
    count = counts[end] - counts[start]
    return (sums[end] - sums[start]) / count if count else math.nan


def _rounded(values: Sequence[float]) -> list[float]:
    """Values to six significant digits: more than a chart shows, in half the bytes."""
    return [float(f"{value:.6g}") for value in values]
