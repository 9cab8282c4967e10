"""fp16's loss scale moves as it should and gives up where it must."""

import pytest

from qdist.core.errors import RunError
from qdist.runtime.loss_scale import LossScale


def test_a_step_that_overflows_halves_the_scale_and_starts_counting_anew() -> None:
    scale = LossScale(dynamic=True)
    scale.update(skipped=False, step=1)
    scale.update(skipped=True, step=2)
    assert (scale.value, scale.finite_steps) == (2.0**15, 0)


def test_five_hundred_finite_steps_double_it() -> None:
    scale = LossScale(dynamic=True)
    for step in range(499):
        scale.update(skipped=False, step=step)
    assert scale.value == 2.0**16
    scale.update(skipped=False, step=500)
    assert (scale.value, scale.finite_steps) == (2.0**17, 0)


def test_it_stops_growing_at_its_largest() -> None:
    scale = LossScale(dynamic=True)
    scale.value = 2.0**24
    for step in range(1000):
        scale.update(skipped=False, step=step)
    assert scale.value == 2.0**24


def test_overflow_at_the_floor_is_an_error_that_names_the_step() -> None:
    scale = LossScale(dynamic=True)
    for step in range(1, 21):
        scale.update(skipped=True, step=step)
    assert scale.value == 0.0625
    with pytest.raises(RunError, match=r"overflow at step 21 even at a loss scale of 0\.0625"):
        scale.update(skipped=True, step=21)


def test_without_fp16_the_scale_is_one_and_nan_is_an_error_at_once() -> None:
    scale = LossScale(dynamic=False)
    for step in range(1000):
        scale.update(skipped=False, step=step)
    assert scale.value == 1.0
    with pytest.raises(RunError, match="NaN or infinite at step 7"):
        scale.update(skipped=True, step=7)
