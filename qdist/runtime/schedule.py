"""The learning rate of each step, a function of the step alone."""

import math

from qdist.core.spec import Optim


def learning_rate(optim: Optim, *, step: int, steps: int) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warm-up, then constant, linear or cosine decay to 0."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    if optim.schedule == "linear":
        return optim.lr * (1 - progress)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
