"""Which evaluation of a run in training is its best, and has it stopped getting better?"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qdist.core.spec.sections import LOSS

Points = tuple[tuple[int, float], ...]
"""(step, figure) of each evaluation, in their order."""


class Outcome(NamedTuple):
    """How far training came, and what was measured meanwhile."""

    steps: int
    held_out: Points = ()
    tasks: Mapping[str, Points] = {}
    ended_early: str = ""
    """Why it ended before its last step, as a sentence; empty if it did not."""


def best_figure(chosen: str | None, tasks: Sequence[str], *, holds_out: bool) -> str:
    """The figure that checkpoints are chosen by: as set; else the held-out loss; else the first task."""
    return chosen or (LOSS if holds_out or not tasks else tasks[0])


def points_of(figure: str, held_out: Points, tasks: Mapping[str, Points]) -> Points:
    """The evaluations of the held-out loss or of a task."""
    return held_out if figure == LOSS else tasks.get(figure, ())


def best_step(points: Points, *, rises: bool) -> int | None:
    """The first step with the best figure, excluding the start of the run; None before there is one.

    rises: whether more is better. NaN is worse than any number.
    """
    trained = [point for point in points if point[0] > 0]
    return min(trained, key=lambda point: (_badness(point[1], rises), point[0]))[0] if trained else None


def since_best(points: Points, *, rises: bool) -> tuple[int, int]:
    """(index of the first best point, evaluations after it); the start of the run counts, as it is to be bettered."""
    order = [_badness(value, rises) for _, value in points]
    index = order.index(min(order))
    return index, len(points) - 1 - index


def reason_to_stop(figure: str, points: Points, *, rises: bool, patience: int, steps: int) -> str:
    """Why a run of `steps` steps ends after its last evaluation, as a sentence without a period; empty if it goes on.

    patience: evaluations without a better figure after which it ends; 0 for never.
    """
    if not patience or not points or points[-1][0] >= steps:
        return ""
    index, since = since_best(points, rises=rises)
    if since < patience:
        return ""
    name, word = "the held-out loss" if figure == LOSS else figure, "risen" if rises else "fallen"
    best = f"{points[index][1]:.4g} at step {points[index][0]:,}"
    evaluations = f"{since} evaluation{'s' if since > 1 else ''}"
    return f"stopped early at step {points[-1][0]:,} of {steps:,}: {name} has not {word} for {evaluations} ({best})"


def _badness(value: float, rises: bool) -> float:
    return math.inf if math.isnan(value) else -value if rises else value
