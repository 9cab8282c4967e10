"""The best evaluation is found, and a run that no longer gets better is noticed."""

import math

import pytest

from qdist.core.evaluation.course import Points, best_figure, best_step, points_of, reason_to_stop, since_best


@pytest.mark.parametrize(
    ("points", "rises", "best"),
    [
        ((), False, None),
        (((0, 1.0),), False, None),
        (((0, 1.0), (5, 3.0), (10, 2.0)), False, 10),
        (((0, 9.0), (5, 3.0), (10, 2.0)), True, 5),
        (((5, 2.0), (10, 2.0)), False, 5),
        (((5, math.nan), (10, 7.0)), False, 10),
        (((5, math.nan), (10, 0.1)), True, 10),
        (((5, math.nan), (10, math.nan)), True, 5),
    ],
)
def test_the_best_step_is_the_first_with_the_best_figure_after_the_start(
    points: Points, rises: bool, best: int | None
) -> None:
    assert best_step(points, rises=rises) == best


@pytest.mark.parametrize(
    ("values", "rises", "since"),
    [([3.0], False, 0), ([3.0, 2.0, 2.0, 2.5], False, 2), ([3.0, 2.0, 4.0], True, 0), ([2.0, 3.0, math.nan], False, 2)],
)
def test_evaluations_since_the_best_are_counted_and_the_start_is_to_be_bettered(
    values: list[float], rises: bool, since: int
) -> None:
    assert since_best(tuple(enumerate(values)), rises=rises)[1] == since


STALLED = ((0, 0.25), (20, 0.312), (40, 0.3), (60, 0.312), (80, 0.31))


@pytest.mark.parametrize(
    ("figure", "points", "rises", "patience", "reason"),
    [
        ("mmlu:a.jsonl", STALLED, True, 3,
         "stopped early at step 80 of 200: mmlu:a.jsonl has not risen for 3 evaluations (0.312 at step 20)"),
        ("mmlu:a.jsonl", STALLED, True, 4, ""),
        ("mmlu:a.jsonl", STALLED, True, 0, ""),
        ("loss", ((0, 2.0), (100, 2.5)), False, 1,
         "stopped early at step 100 of 200: the held-out loss has not fallen for 1 evaluation (2 at step 0)"),
        ("loss", ((0, 2.0), (200, 2.5)), False, 1, ""),
        ("loss", (), False, 1, ""),
    ],
)  # fmt: skip
def test_a_run_ends_once_its_patience_is_over_and_says_why(
    figure: str, points: Points, rises: bool, patience: int, reason: str
) -> None:
    assert reason_to_stop(figure, points, rises=rises, patience=patience, steps=200) == reason


@pytest.mark.parametrize(
    ("chosen", "tasks", "holds_out", "best"),
    [
        (None, (), True, "loss"),
        (None, ("mmlu:a",), True, "loss"),
        (None, ("mmlu:a", "mmlu:b"), False, "mmlu:a"),
        (None, (), False, "loss"),
        ("mmlu:b", ("mmlu:a", "mmlu:b"), True, "mmlu:b"),
    ],
)
def test_the_best_is_chosen_by_what_was_set_or_the_loss_or_the_first_task(
    chosen: str | None, tasks: tuple[str, ...], holds_out: bool, best: str
) -> None:
    assert best_figure(chosen, tasks, holds_out=holds_out) == best


def test_points_are_those_of_the_loss_or_of_a_task() -> None:
    held_out, tasks = ((0, 1.0),), {"mmlu:a": ((0, 0.5),)}
    assert points_of("loss", held_out, tasks) == held_out
    assert points_of("mmlu:a", held_out, tasks) == ((0, 0.5),)
    assert points_of("mmlu:b", held_out, tasks) == ()
