"""Did a model get better than another by some task, and is that more than chance?"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import msgspec

from qdist.core.evaluation.results import Evaluation, Figure, TaskResult, What
from qdist.core.evaluation.statistics import Shift, interval_of_mean, mean_of, shift_of_means, wilson

Word = Literal["better", "worse", "no difference beyond chance"]
CHANCE = 0.05
"""Probability below which a difference is not put down to chance."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What one model's figure exceeds another's by, over the same items."""

    task: str
    figure: str
    model: str
    against: str
    value: float
    low: float
    high: float
    """Ends of the 95 % interval, in the figure's own unit."""
    chance: float
    """Probability of as large a difference between two that are alike."""
    count: int
    """Items, all of which both have answered."""
    word: Word


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a comparison, with its latest result of each task."""

    name: str
    what: What
    results: tuple[TaskResult, ...]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Models beside each other, for programs."""

    evaluations: tuple[Evaluation, ...]
    differences: tuple[Difference, ...]


def comparison_of(evaluations: Sequence[Evaluation]) -> Comparison:
    """Evaluations with their intervals, and the differences between their models."""
    whole = tuple(msgspec.structs.replace(own, results=tuple(map(with_intervals, own.results))) for own in evaluations)
    return Comparison(evaluations=whole, differences=differences_of(columns_of(whole)))


def with_intervals(result: TaskResult) -> TaskResult:
    """The same with an interval for each figure that what is known allows one for: the first, and all accuracies."""
    first, *others = result.figures
    return msgspec.structs.replace(
        result,
        figures=(_with_interval_of(first, result), *map(_as_share, others)),
        groups={name: _as_share(figure) for name, figure in result.groups.items()},
    )


def _with_interval_of(figure: Figure, result: TaskResult) -> Figure:
    """The interval of a mean of outcomes; none for a figure that is something else."""
    if figure.low is not None or not result.outcomes:
        return figure
    sure = interval_of_mean(result.outcomes, result.weights)
    if sure is None or not is_of_mean(figure, mean_of(result.outcomes, result.weights)):
        return figure
    low, high = (math.exp(end) if _is_logarithmic(figure) else end for end in sure)
    return msgspec.structs.replace(figure, low=low, high=high)


def is_of_mean(figure: Figure, mean: float) -> bool:
    """Whether a figure is the mean of its outcomes, or for a perplexity the exponential of that."""
    value = figure.value
    if _is_logarithmic(figure):
        value = math.log(value) if value > 0 else math.nan
    return math.isclose(value, mean, rel_tol=1e-6, abs_tol=1e-9)


def _is_logarithmic(figure: Figure) -> bool:
    """Whether it is the exponential of the mean of its outcomes: perplexity, and word_perplexity of lm_eval."""
    return "perplexity" in figure.name


def _as_share(figure: Figure) -> Figure:
    if figure.low is not None or not figure.name.startswith("accuracy") or not 0 <= figure.value <= 1:
        return figure
    low, high = wilson(figure.value * figure.count, figure.count)
    return msgspec.structs.replace(figure, low=low, high=high)


def columns_of(evaluations: Sequence[Evaluation]) -> tuple[Column, ...]:
    """The models of some evaluations, the base first, each task as it was last found."""
    targets = _short_names({own.target for own in evaluations})
    found: dict[tuple[int, str], dict[str, TaskResult]] = {}
    kinds: dict[str, What] = {}
    for own in sorted(evaluations, key=lambda own: own.time):
        short = targets[own.target]
        alone = own.what if len(targets) == 1 else f"{own.what} of {short}"
        name = short if own.what == "model" else alone
        kinds[name] = own.what
        results = found.setdefault((_ORDER.index(own.what), name), {})
        results.update({result.task: with_intervals(result) for result in own.results})
    return tuple(
        Column(name=name, what=kinds[name], results=tuple(results.values()))
        for (_, name), results in sorted(found.items(), key=lambda item: item[0][0])
    )


_ORDER: tuple[What, ...] = ("base", "adapter", "merged", "model")


def _short_names(targets: Collection[str]) -> dict[str, str]:
    """Targets by the last part of their paths, where that tells them apart; of files that are judged, by each's."""
    last = {target: ",".join(map(_last_part, target.split(","))) for target in targets}
    return last if len(set(last.values())) == len(last) else {target: target for target in targets}


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path


def differences_of(columns: Sequence[Column]) -> tuple[Difference, ...]:
    """Of each model after the first, against the first, in each task that both were asked alike."""
    return tuple(
        difference
        for first in columns[:1]
        for result in first.results
        for second in columns[1:]
        for other in second.results
        if other.task == result.task and (difference := _difference(first.name, result, second.name, other))
    )


def _difference(first: str, result: TaskResult, second: str, other: TaskResult) -> Difference | None:
    """None where the two were not asked the same items, or a single one."""
    if not _asked_alike(result, other):
        return None
    shift = shift_of_means(result.outcomes, other.outcomes, result.weights)
    if shift is None:
        return None
    figure, its = result.figures[0], other.figures[0]
    low, high = sorted(_in_unit(end, figure) for end in shift.interval)
    return Difference(
        task=result.task, figure=figure.name, model=second, against=first, value=its.value - figure.value, low=low,
        high=high, chance=shift.chance, count=len(result.outcomes),
        word=_word(shift, more_is_better=figure.more_is_better),
    )  # fmt: skip


def _asked_alike(result: TaskResult, other: TaskResult) -> bool:
    same_items = len(result.outcomes) == len(other.outcomes) and result.weights == other.weights
    return same_items and result.settings == other.settings


def _in_unit(shift: float, figure: Figure) -> float:
    """A shift of the mean outcome as one of the figure."""
    return figure.value * math.expm1(shift) if _is_logarithmic(figure) else shift


def _word(shift: Shift, *, more_is_better: bool) -> Word:
    if shift.chance >= CHANCE:
        return "no difference beyond chance"
    return "better" if (shift.mean > 0) == more_is_better else "worse"


def incomparable(columns: Sequence[Column]) -> Iterator[str]:
    """A sentence for each task whose results of two models cannot be compared."""
    compared = {(own.task, own.model) for own in differences_of(columns)}
    for first in columns[:1]:
        tasks = {result.task: result for result in first.results if result.outcomes}
        for second in columns[1:]:
            for other in second.results:
                if other.task in tasks and (other.task, second.name) not in compared and other.outcomes:
                    alike = _asked_alike(tasks[other.task], other)
                    why = "have a single outcome each" if alike else "were not asked the same"
                    yield f"{other.task}: {second.name} and {first.name} {why}, and are not compared"
