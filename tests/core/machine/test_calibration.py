"""Do past runs correct the next prediction, without compounding and without being fooled?"""

from typing import Any

import msgspec
import pytest

from qdist.core.machine.calibration import CalibrationSample, Correction, correction
from qdist.core.text import GIB, MIB

LESSON = CalibrationSample(
    card="NVIDIA H200", gpus=4, world_size=4, placement="shard", gpus_per_group=4, zero_stage=0, model="llama-65b",
    bits=4, seq_len=512, micro_batch=16, checkpointed_layers=80, predicted_bytes=24 * GIB, measured_bytes=25 * GIB,
    predicted_context_bytes=GIB, measured_context_bytes=2 * GIB, predicted_tokens_s=5000.0, measured_tokens_s=4500.0,
    rates="measured", version="0.1.0", useful_share=1.0,
)  # fmt: skip


def lesson(**changes: Any) -> CalibrationSample:
    return msgspec.structs.replace(LESSON, **changes)


def learnt(*lessons: CalibrationSample, **asked: Any) -> Correction | None:
    return correction(lessons, **{"card": "NVIDIA H200", "world_size": 4, **asked})


def test_measured_over_predicted_and_the_measured_context() -> None:
    assert learnt(LESSON) == Correction(speed=0.9, speeds=(("shard", 0.9),), context_bytes=2 * GIB, runs=1)


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.1, 0.5), (0.8, 0.8), (1.9, 1.9), (3.0, 2.0)]
)  # fmt: skip
def test_a_ratio_stays_within_reason(ratio: float, kept: float) -> None:
    found = learnt(lesson(measured_tokens_s=5000.0 * ratio))
    assert found is not None
    assert found.speed == pytest.approx(kept)


def test_a_prediction_that_counted_padding_says_nothing_of_speed() -> None:
    """An older qdist compared positions with tokens: a run of short samples looked half as fast as planned."""
    assert learnt(lesson(useful_share=0.0)) == Correction(context_bytes=2 * GIB, runs=1)


def test_one_odd_run_does_not_count_and_old_ones_are_forgotten() -> None:
    old = [lesson(measured_tokens_s=2600.0, measured_context_bytes=GIB)] * 20
    new = [lesson(measured_tokens_s=5500.0)] * 9 + [lesson(measured_tokens_s=900.0)]
    found = learnt(*old, *new)
    assert found is not None
    assert (found.speed, found.context_bytes) == (1.1, 2 * GIB)


def test_each_placement_has_its_own_ratio() -> None:
    found = learnt(LESSON, lesson(placement="split", measured_tokens_s=4000.0), lesson(measured_tokens_s=4600.0))
    assert found is not None
    assert (found.speed_of("split"), found.speed_of("shard"), found.speed_of("replicate")) == (0.8, 0.91, 0.9)
    only = learnt(LESSON, lesson(placement="split", measured_tokens_s=4000.0), placement="split")
    assert only is not None
    assert (only.speed, only.speeds) == (0.8, (("split", 0.8),))


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"card": "NVIDIA A10"}, {}),
        ({"predicted_tokens_s": 0.0, "world_size": 2}, {}),
        ({"world_size": 2}, {"bits": 8}),
        ({"world_size": 2}, {"rates": "table"}),
        ({"world_size": 2}, {"version": "0.2.0"}),
        ({"measured_context_bytes": None}, {"placement": "split"}),
        ({"measured_context_bytes": 5 * GIB}, {"placement": "split"}),
    ],
)
def test_what_does_not_compare_teaches_nothing(changes: dict[str, Any], asked: dict[str, Any]) -> None:
    assert learnt(lesson(**changes), **asked) is None


def test_speed_is_learnt_on_any_number_of_ranks_and_context_on_the_same() -> None:
    found = learnt(lesson(world_size=2, measured_context_bytes=700 * MIB))
    assert found is not None
    assert (found.speed, found.context_bytes) == (0.9, None)


def test_runs_in_fp8_teach_the_speed_of_runs_in_fp8() -> None:
    found = learnt(lesson(compute="fp8"), compute="fp8")
    assert found is not None
    assert found.speed == 0.9
    assert learnt(lesson(compute="fp8")) == Correction(context_bytes=2 * GIB, runs=1)
