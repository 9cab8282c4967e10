"""Learning rates by step."""

import pytest

from qdist.core.spec.sections import Optim
from qdist.runtime.train.loop import learning_rate


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 2, [0.5, 1.0, 1.0, 0.5]),
        ("linear", 4, [0.25, 0.5, 0.75, 1.0]),
        ("linear", 8, [0.125, 0.25, 0.375, 0.5]),
        ("cosine", 0, [1.0, 0.8535534, 0.5, 0.1464466]),
        ("cosine", 2, [0.5, 1.0, 1.0, 0.5]),
    ],
)
def test_a_schedule_of_four_steps(schedule: str, warmup: int, rates: list[float]) -> None:
    optim = Optim(lr=1.0, schedule=schedule, warmup_steps=warmup)  # type: ignore[arg-type]
    assert [learning_rate(optim, step=step, steps=4) for step in range(4)] == pytest.approx(rates)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_no_step_has_a_rate_of_zero_or_above_the_given(schedule: str) -> None:
    optim = Optim(lr=3e-4, schedule=schedule)  # type: ignore[arg-type]
    assert all(0 < learning_rate(optim, step=step, steps=50) <= 3e-4 for step in range(50))
