"""Are models compared over the same items, in the figure's own unit, and by a word that chance allows?"""

import math
from typing import Any

import msgspec
import pytest

from qdist.core.evaluation.comparison import (
    columns_of,
    comparison_of,
    differences_of,
    incomparable,
    with_intervals,
)
from qdist.core.evaluation.results import Evaluation, Figure, TaskResult, What
from qdist.core.evaluation.statistics import wilson


def accuracy(right: int, count: int = 100, **more: Any) -> TaskResult:
    figure = Figure(name="accuracy", value=right / count, count=count)
    outcomes = (1.0,) * right + (0.0,) * (count - right)
    return TaskResult(task="mmlu:FILE", figures=(figure,), outcomes=outcomes, **more)


def perplexity(losses: list[float], weights: tuple[float, ...]) -> TaskResult:
    mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    figure = Figure(name="perplexity", value=math.exp(mean), count=int(sum(weights)), more_is_better=False)
    return TaskResult(task="perplexity:FILE", figures=(figure,), outcomes=tuple(losses), weights=weights)


def evaluation(what: What, *results: TaskResult, target: str = "runs/1", time: float = 0.0) -> Evaluation:
    return Evaluation(target=target, what=what, results=results, time=time)


def test_the_base_comes_first_and_the_latest_result_counts() -> None:
    columns = columns_of([
        evaluation("merged", accuracy(50), time=3), evaluation("adapter", accuracy(40), time=4),
        evaluation("base", accuracy(30), time=2), evaluation("adapter", accuracy(60), time=1),
    ])  # fmt: skip
    assert [column.name for column in columns] == ["base", "adapter", "merged"]
    assert columns[1].results[0].figures[0].value == 0.4


def test_models_of_several_targets_have_their_names() -> None:
    columns = columns_of([
        evaluation("adapter", accuracy(50)), evaluation("model", accuracy(40), target="models/smollm2"),
        evaluation("adapter", accuracy(40), target="runs/2"),
    ])  # fmt: skip
    assert [column.name for column in columns] == ["adapter of 1", "adapter of 2", "smollm2"]


def test_files_that_are_judged_together_have_all_their_names() -> None:
    (column,) = columns_of([evaluation("model", accuracy(1), target="runs/1/a.jsonl,runs/1/b.jsonl")])
    assert column.name == "a.jsonl,b.jsonl"


def test_targets_that_end_alike_keep_their_paths() -> None:
    columns = columns_of([evaluation("adapter", accuracy(50)), evaluation("adapter", accuracy(40), target="old/1")])
    assert [column.name for column in columns] == ["adapter of runs/1", "adapter of old/1"]


@pytest.mark.parametrize(
    ("right", "word"),
    [(60, "better"), (51, "no difference beyond chance"), (50, "no difference beyond chance"), (40, "worse")],
)
def test_a_difference_has_a_word(right: int, word: str) -> None:
    columns = columns_of([evaluation("base", accuracy(50)), evaluation("adapter", accuracy(right))])
    (found,) = differences_of(columns)
    assert (found.word, found.against, found.model, found.count) == (word, "base", "adapter", 100)
    assert found.value == pytest.approx((right - 50) / 100)
    assert found.low <= found.value <= found.high


def test_a_lower_perplexity_is_better_and_its_difference_is_in_its_own_unit() -> None:
    weights = tuple(100.0 + number for number in range(40))
    first = [3.0 + 0.01 * (number % 7) for number in range(40)]
    second = [loss - 0.2 - 0.01 * (number % 3) for number, loss in enumerate(first)]
    base, adapter = perplexity(first, weights), perplexity(second, weights)
    (found,) = differences_of(columns_of([evaluation("base", base), evaluation("adapter", adapter)]))
    assert found.word == "better"
    assert found.value == pytest.approx(adapter.figures[0].value - base.figures[0].value)
    assert found.low < found.value < found.high < 0


def test_perplexities_of_words_are_compared_in_their_own_unit_too() -> None:
    weights = tuple(100.0 + number for number in range(40))
    results = [perplexity([3.0 - shift + 0.01 * (n % 7) for n in range(40)], weights) for shift in (0.0, 0.2)]
    named = [
        msgspec.structs.replace(own, figures=(msgspec.structs.replace(own.figures[0], name="word_perplexity"),))
        for own in results
    ]
    (found,) = differences_of(
        columns_of([evaluation(what, own) for what, own in zip(("base", "adapter"), named, strict=True)])
    )
    assert (found.low, found.high) == pytest.approx((found.value, found.value))


@pytest.mark.parametrize(
    "other", [accuracy(50, 90), accuracy(50, settings={"shots": 5}), accuracy(50, weights=(1.0,) * 100)]
)
def test_what_was_not_asked_alike_is_not_compared(other: TaskResult) -> None:
    columns = columns_of([evaluation("base", accuracy(50)), evaluation("adapter", other)])
    assert differences_of(columns) == ()
    assert list(incomparable(columns)) == ["mmlu:FILE: adapter and base were not asked the same, and are not compared"]


def test_a_single_outcome_each_is_not_told_as_another_question() -> None:
    columns = columns_of(
        [evaluation("base", perplexity([2.0], (9.0,))), evaluation("adapter", perplexity([1.9], (9.0,)))]
    )
    assert differences_of(columns) == ()
    (why,) = incomparable(columns)
    assert "adapter and base have a single outcome each" in why


def test_programs_get_intervals_and_differences_too() -> None:
    losses, weights = [3.0, 3.2, 3.4, 2.9], (10.0, 10.0, 20.0, 10.0)
    found = comparison_of([
        evaluation("base", accuracy(50), perplexity(losses, weights)), evaluation("adapter", accuracy(70)),
    ])  # fmt: skip
    assert [(own.task, own.word) for own in found.differences] == [("mmlu:FILE", "better")]
    right, wondering = (result.figures[0] for result in found.evaluations[0].results)
    assert (right.low, right.high) == pytest.approx(wilson(50, 100))
    assert (wondering.low or 0) < wondering.value < (wondering.high or 0)


def test_a_figure_that_is_not_the_mean_of_its_outcomes_gets_no_interval() -> None:
    result = TaskResult(task="x", figures=(Figure(name="f1", value=0.9, count=3),), outcomes=(0.0, 1.0, 0.0))
    assert with_intervals(result) == result
