"""fp16's loss scale moves as it should and gives up where it must."""

import math
from pathlib import Path

import pytest

from qdist.core.errors import RunError
from qdist.host.run.rundir import RunDir
from qdist.runtime.train.loop import LossScale

RUN = RunDir("nowhere")


def update(scale: LossScale, *, skipped: bool, step: int, loss: float = 2.0, run: RunDir = RUN) -> None:
    scale.update(skipped=skipped, step=step, loss=loss, run=run)


def test_a_step_that_overflows_halves_the_scale_and_starts_counting_anew() -> None:
    scale = LossScale(dynamic=True)
    update(scale, skipped=False, step=1)
    update(scale, skipped=True, step=2)
    assert (scale.value, scale.finite_steps) == (2.0**15, 0)


def test_five_hundred_finite_steps_double_it() -> None:
    scale = LossScale(dynamic=True)
    for step in range(499):
        update(scale, skipped=False, step=step)
    assert scale.value == 2.0**16
    update(scale, skipped=False, step=500)
    assert (scale.value, scale.finite_steps) == (2.0**17, 0)


def test_it_stops_growing_at_its_largest() -> None:
    scale = LossScale(dynamic=True)
    scale.value = 2.0**24
    for step in range(1000):
        update(scale, skipped=False, step=step)
    assert scale.value == 2.0**24


def test_overflow_at_the_floor_is_an_error_that_names_the_step() -> None:
    scale = LossScale(dynamic=True)
    for step in range(1, 21):
        update(scale, skipped=True, step=step)
    assert scale.value == 0.0625
    with pytest.raises(RunError, match=r"infinite at step 21 in fp16, even at a loss scale of 0\.0625; there is no"):
        update(scale, skipped=True, step=21)


def test_without_fp16_the_scale_is_one_and_nan_is_an_error_at_once() -> None:
    scale = LossScale(dynamic=False)
    for step in range(1000):
        update(scale, skipped=False, step=step)
    assert scale.value == 1.0
    with pytest.raises(RunError, match="NaN or infinite at step 7"):
        update(scale, skipped=True, step=7)


def test_a_first_loss_that_is_no_number_is_no_fault_of_the_learning_rate() -> None:
    with pytest.raises(RunError, match="the loss of step 1 is nan before any training") as caught:
        update(LossScale(dynamic=False), skipped=True, step=1, loss=math.nan)
    assert "optim.lr" not in caught.value.try_
    with pytest.raises(RunError, match="gradients are NaN or infinite at step 1"):
        update(LossScale(dynamic=False), skipped=True, step=1)


def test_a_loss_that_is_no_number_is_named_with_the_last_checkpoint(tmp_path: Path) -> None:
    folder = RunDir(tmp_path).checkpoint(4)
    folder.mkdir(parents=True)
    (folder / "DONE").touch()
    with pytest.raises(RunError, match="the loss is nan at step 7; the last checkpoint is of step 4"):
        update(LossScale(dynamic=False), skipped=True, step=7, loss=math.nan, run=RunDir(tmp_path))
