"""When is a loss so much above those before it that a person should look? The monitor and the report ask alike."""

import math
from collections.abc import Sequence
from statistics import fmean

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
