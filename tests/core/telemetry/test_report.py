"""Does a report say what a run did, with the numbers a person would compute?"""

import math
from array import array
from typing import Any

import msgspec
import pytest

from qdist.core.planning.plan import DataFacts, Plan
from qdist.core.telemetry.curves import evenly, smoothed, thinned
from qdist.core.telemetry.events import Event
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.memory_report import REST, TOTAL, WORKING, memory_of, shown
from qdist.core.telemetry.report import Found, Report, differences, metrics_beside, report_of
from qdist.core.telemetry.report_sections import number
from qdist.core.telemetry.snapshot import Snapshot
from qdist.core.text import GIB
from tests.plans import CPU, gpus, planned

PLAN = planned("smollm2-135m", gpus(2, 140), {"gpus": 2})


def step(number: int, loss: float | None = 2.0, *, rank: int = 0, **more: Any) -> Event:
    said = {"tokens": 1000, "own_tokens": 500, "seconds": 2.0, "data_s": 0.02, "busy_s": 1.5, "update_s": 0.25, **more}
    return Event(kind="step", step=number, total_steps=60, loss=loss, rank=rank, time=2.0 * number, **said)


def folded(*events: Event) -> RunHistory:
    fold = RunHistory(total_steps=60)
    fold.add([Event(kind="start", total_steps=60), *events])
    return fold


def report(
    fold: RunHistory, plan: Plan = PLAN, *, state: str = "running", result: dict[str, Any] | None = None
) -> Report:
    seen = Snapshot(name="r", plan=plan, fold=fold, now=0.0, state=state)
    return report_of(Found(seen=seen, result=result))


def result_of(plan: Plan, *, held: bool = True, allocated: int = 5 * GIB) -> dict[str, Any]:
    stays = {"weights": 3 * GIB, "adapter": GIB // 4, "gradients": GIB // 4, "optimizer": GIB // 2}
    peak = {"allocated": allocated, "context": GIB, "reserved": 0, "load": 0}
    found: dict[str, Any] = {"peaks": [[peak] for _ in plan.ranks], "tokens_per_s": {"measured": 4000.0}}
    return found | ({"held": [stays for _ in plan.ranks]} if held else {})


def test_a_long_curve_keeps_its_spikes_and_its_ends() -> None:
    values = array("d", [1.0] * 100_000)
    values[54_321], values[77_777] = 9.0, -4.0
    curve = thinned("loss", "raw", range(1, 100_001), values, most=200)
    points = dict(zip(curve.x, curve.y, strict=True))
    assert (points[54_322], points[77_778]) == (9.0, -4.0)
    assert len(curve.x) <= 200
    assert curve.x == sorted(set(curve.x))


def test_a_curve_of_numbers_that_are_none_keeps_the_others() -> None:
    values = [1.0, math.nan, 3.0, 2.0, *[math.nan] * 4]
    curve = thinned("loss", "raw", range(8), values, most=4)
    assert (curve.x[:2], curve.y[:2]) == ([0, 2], [1.0, 3.0])
    assert math.isnan(curve.y[2])
    assert thinned("loss", "raw", range(8), values).x == [*range(8)]


def test_a_smoothed_curve_is_the_mean_of_the_last_ten_steps_that_have_a_number() -> None:
    values = [float(number) for number in range(20)]
    assert smoothed(range(20), values)[1][-1] == pytest.approx(14.5)
    values[19] = math.nan
    steps, means = smoothed(range(20), values)
    assert (steps[-1], means[-1]) == (19, pytest.approx(14.0))


def test_evenly_chosen_steps_have_the_first_and_the_last() -> None:
    assert evenly(range(1000), 4) == [0, 333, 666, 999]


def test_what_was_trained_on_and_whether_it_got_gradients_is_kept() -> None:
    told = Event(kind="inventory", note="adapted   14 of 14 linears\ndata      40 samples")
    checked = Event(kind="gradients", step=2, note="all 28 trained tensors have some")
    assert report(folded(told, step(1), checked)).inventory == (
        ("adapted", "14 of 14 linears"),
        ("data", "40 samples"),
        ("gradients", "all 28 trained tensors have some"),
    )


@pytest.mark.parametrize(
    ("state", "headline"),
    [
        ("planned", "Planned, and never started."),
        ("running", "Running, step 2 of 60, about 1 min 56 s left."),
        ("finished", "Finished all 60 steps."),
        ("stopped", "Stopped on request at step 2 of 60."),
        ("failed", "Failed at step 2 of 60."),
        ("killed", "Killed at step 2 of 60."),
    ],
)
def test_a_state_is_told_in_words(state: str, headline: str) -> None:
    assert report(folded(step(1), step(2)), state=state).headline == headline


def test_tasks_stand_beside_the_held_out_loss_and_have_charts() -> None:
    early = "stopped early at step 2 of 60: mmlu:a has not risen for 1 evaluation (0.25 at step 0)"
    found = report(
        folded(
            Event(kind="eval", step=0, held_out_loss=2.0),
            Event(kind="eval", step=0, task="mmlu:a", figure=0.25),
            step(1),
            step(2),
            Event(kind="eval", step=2, task="mmlu:a", figure=0.125),
            Event(kind="end", step=2, note=early),
        ),
        state="finished",
    )
    assert found.held_out.headers == ("step", "held-out loss", "perplexity", "mmlu:a", "")
    assert found.held_out.rows == (("0", "2", "7.389", "0.25", "best"), ("2", "-", "-", "0.125", ""))
    assert [(chart.title, chart.series[0].y) for chart in found.charts if chart.key == "mmlu:a"] == [
        ("mmlu:a", [0.25, 0.125])
    ]
    assert found.headline == f"S{early[1:]}."


def test_a_run_that_never_started_has_a_report() -> None:
    own = report(RunHistory(total_steps=60), state="planned")
    assert (own.charts, own.step, own.warnings, own.numbers.rows) == ((), (), (), ())
    assert own.memory[0].measured == {}


def test_gpu_hours_are_of_all_gpus() -> None:
    rows = dict(report(folded(step(1), step(1800))).summary)
    assert (rows["Duration"], rows["GPU hours"], rows["Tokens"]) == ("1 h 00 min", "2", "2,000 trained on")


def test_the_parts_of_a_step_are_all_of_it() -> None:
    parts = {part.name: (part.milliseconds, part.share) for part in report(folded(step(1), step(2))).step}
    assert parts["making samples"] == pytest.approx((20, 0.01))
    assert parts["forward and backward passes"] == pytest.approx((1480, 0.74))
    assert parts["waiting for other ranks, and all else"] == pytest.approx((250, 0.125))
    assert sum(share for _, share in parts.values()) == pytest.approx(1)


def test_what_the_peak_exceeds_the_lasting_tensors_by_is_the_working_set() -> None:
    own = memory_of(PLAN, RunHistory(), result_of(PLAN))[0]
    assert (own.label, own.measured[WORKING], own.measured_bytes) == ("GPU 0", GIB, 6 * GIB)
    assert own.predicted_bytes == PLAN.ranks[0].expected[0].total


def test_a_rank_on_cpus_has_parts_and_a_rest() -> None:
    plan = planned("smollm2-135m", CPU, {"gpus": 2})
    own = memory_of(plan, RunHistory(), result_of(plan))[1]
    assert (own.label, own.measured[REST], own.measured_bytes) == ("rank 1", 2 * GIB, 6 * GIB)
    assert memory_of(plan, RunHistory(), result_of(plan, held=False))[0].measured == {TOTAL: 6 * GIB}


def test_a_running_run_knows_the_peak_alone() -> None:
    fold = folded(step(1, memory_bytes=7 * GIB), step(1, rank=1))
    assert [own.measured for own in memory_of(PLAN, fold, None)] == [{TOTAL: 7 * GIB}, {}]


def test_of_many_gpus_that_are_alike_the_fullest_is_shown() -> None:
    plan = planned("smollm2-135m", gpus(8, 140), {"gpus": 8, "global_batch": 64})
    (own,) = shown(memory_of(plan, RunHistory(), result_of(plan)))
    assert own.label == "GPU 0, the fullest of 8 alike"


def test_useful_tokens_stand_beside_all_tokens_where_there_is_padding() -> None:
    padded = report(folded(*(step(number, padding=1000) for number in range(1, 9))))
    rows = dict(padded.pace)
    assert (rows["Useful tokens/s measured"], rows["Tokens/s with padding"]) == ("500", "1,000")
    assert (padded.metrics["tokens_per_s"], padded.metrics["positions_per_s"]) == (500.0, 1000.0)
    full = report(folded(*(step(number) for number in range(1, 9))))
    assert "Tokens/s measured" in dict(full.pace)
    assert "Tokens/s with padding" not in dict(full.pace)
    compared = {row[0]: row[1:3] for row in metrics_beside(full, padded).rows}
    assert (compared["Useful tokens/s"], compared["Tokens/s with padding"]) == (("500", "500"), ("500", "1,000"))


def test_the_way_out_of_padding_fits_the_run() -> None:
    fold = folded(step(1, padding=1000))
    packed = msgspec.structs.replace(PLAN, packed=True)
    bloom = planned("bloom-560m", gpus(2, 140), {"gpus": 2})
    for plan, way in ((packed, "another micro_batch, or a larger global_batch,"), (bloom, "a smaller micro_batch, or")):
        assert any(f"are padding: {way}" in warning for warning in report(fold, plan).warnings)


def test_nothing_odd_gives_no_warning() -> None:
    fold = folded(*(step(number, 3 - number / 100) for number in range(1, 60)))
    allocated = PLAN.ranks[0].expected[0].total - GIB
    result = result_of(PLAN, held=False, allocated=allocated)
    result["tokens_per_s"]["measured"] = PLAN.tokens_per_second
    assert report(fold, result=result, state="finished").warnings == ()


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (
            [step(1), step(2, skipped=True)],
            "1 of 2 updates were skipped because the gradients were NaN or infinite: step 2.",
        ),
        ([step(1), step(2, None)], "The loss is NaN or infinite at step 2: try a smaller optim.lr."),
        ([*(step(n) for n in range(1, 20)), step(20, 5.0)], "The loss jumped from 2.000 to 5.000 at step 20."),
        ([step(1, memory_bytes=200 * GIB)], "Memory was"),
        ([step(1, padding=1000)], "50 % of the computed positions are padding: pack=true would waste less"),
        ([step(1, data_s=0.5)], "making samples took 25 % of the steps' time"),
        ([step(1), step(1, rank=1, busy_s=1.8)], "rank 1's passes take 20 % longer"),
        ([step(1), Event(kind="resume", step=1, time=9.0)], "The run was resumed 1 time: from step 1."),
        (
            [Event(kind="eval", step=5, held_out_loss=1.0), Event(kind="eval", step=9, held_out_loss=1.5)],
            "The held-out loss was best at step 5 (1) and rose to 1.5 at step 9",
        ),
        (
            [Event(kind="eval", step=0, held_out_loss=1.0), Event(kind="eval", step=9, held_out_loss=1.5)],
            "The held-out loss rose from 1 before training to 1.5 at step 9: this adapter does harm",
        ),
        ([step(n, tokens=1) for n in range(1, 11)], "slower than planned"),
    ],
)
def test_what_is_odd_is_said(events: list[Event], words: str) -> None:
    found = [warning for warning in report(folded(*events)).warnings if words in warning]
    assert len(found) == 1


def test_settings_that_differ_from_their_defaults_are_listed() -> None:
    plan = planned("smollm2-135m", gpus(1, 140), {"lora.r": 8})
    assert ("lora.r", "8", "64") in report(RunHistory(), plan).settings.rows


@pytest.mark.parametrize(("bad", "said"), [(0, "128"), (1_200, "128, 1,200 bad records left out")])
def test_bad_records_that_were_left_out_are_counted(bad: int, said: str) -> None:
    data = DataFacts(
        path="cache", samples=100, train_samples=90, held_out_samples=10, tokens=5000, longest=128, bad=bad
    )
    rows = report(RunHistory(), planned("smollm2-135m", gpus(1, 140), {"data": "d.jsonl"}, data=data)).summary
    told = f"d.jsonl: 90 samples and 10 held out, 5,000 tokens, the longest {said}"
    assert ("Data", told) in rows


def test_two_runs_are_told_apart_by_settings_and_figures() -> None:
    other = planned("smollm2-135m", gpus(2, 140), {"gpus": 2, "optim.lr": 1e-3})
    a, b = report(folded(step(1, 2.0))), report(folded(step(1, 1.0)), other)
    assert differences(a, b).rows == (("optim.lr", "0.0002", "0.001"),)
    assert ("Loss, mean of the last steps, 20 at most", "2", "1", "-50.0 %") in metrics_beside(a, b).rows
    assert differences(a, a).rows == ()


@pytest.mark.parametrize(
    ("value", "said"),
    [(math.nan, "-"), (2e-4, "0.0002"), (1.23456, "1.235"), (12345.6, "12,346"), (math.exp(700), "1.0e+304")],
)
def test_a_number_is_as_short_as_it_can_be(value: float, said: str) -> None:
    assert number(value) == said
