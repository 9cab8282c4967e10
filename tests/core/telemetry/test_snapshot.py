"""Does a snapshot say what a run needs a person for, and count its arithmetic right?"""

import math
import socket
from typing import Any

import msgspec
import pytest

from qdist.core.telemetry.events import Event
from qdist.core.telemetry.heartbeat import Heartbeat
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.snapshot import Reading, Snapshot, mfu, model_flops_per_token, rows
from qdist.core.telemetry.warnings import find_warnings
from qdist.core.text import GIB
from tests.plans import CPU, machine, planned

NOW = 1000.0


def warnings(seen: Snapshot) -> list[str]:
    return [warning.text for warning in find_warnings(seen)]


def steps(losses: list[float], *, ranks: int = 1, memory_gib: float = 1, **fields: Any) -> RunHistory:
    fold = RunHistory(total_steps=100)
    for rank in range(ranks):
        told = {"tokens": 4096, "own_tokens": 2048, "seconds": 2.0, "busy_s": 1.0 + rank * fields.pop("apart", 0.0)}
        told |= {"learning_rate": 2e-4, **fields}
        fold.add_of_rank(
            rank,
            [
                Event(kind="step", step=step, loss=loss, rank=rank, memory_bytes=int(memory_gib * GIB), **told)
                for step, loss in enumerate(losses, 1)
            ],
        )
    return fold


def snapshot(fold: RunHistory, *, device: str = "cuda", ranks: int = 1, **fields: Any) -> Snapshot:
    plan = planned("llama-7b", CPU if device == "cpu" else machine(*[140] * ranks), {"gpus": ranks})
    plan = msgspec.structs.replace(plan, tokens_per_second=2048.0)  # as `steps` are
    fields = {"card_bytes": (140 * GIB,) * ranks, "state": "running", **fields}
    return Snapshot(name="r1", plan=plan, fold=fold, now=NOW, **fields)


def pulse(rank: int, *, memory_bytes: int = 0) -> Heartbeat:
    return Heartbeat(
        rank=rank, pid=1, host=socket.gethostname(), time=NOW - 3, phase="training", memory_bytes=memory_bytes
    )


def test_a_run_that_goes_well_has_no_warnings() -> None:
    assert warnings(snapshot(steps([3 - n / 10 for n in range(20)]))) == []


def test_what_to_try_after_a_failure_is_left_to_its_error() -> None:
    assert warnings(snapshot(steps([2.0, math.nan]), state="failed")) == ["the loss is NaN or infinite at step 2"]


@pytest.mark.parametrize(
    ("fold", "said"),
    [
        (steps([2.0, 2.0, math.nan, math.nan]), "the loss is NaN or infinite at steps 3, 4: try a smaller optim.lr"),
        (steps([2.0] * 12 + [5.0]), "the loss jumped from 2.000 to 5.000 at step 13"),
        (steps([2.0, 9.0, 8.0, 10.0]), "the loss has risen from 2.000 to 9.000: training does harm"),
        (steps([2.0] * 4, memory_gib=137), "rank 0 is at 137 GiB of 140 GiB (98%)"),
        (steps([2.0] * 4, data_s=1.0), "data stalls: making samples took 50 %"),
        (steps([2.0] * 4, padding=4096), "50 % of the computed positions are padding"),
        (
            steps([2.0] * 4, skipped=True),
            "4 of 4 updates were skipped because the gradients were NaN or infinite: steps 1, 2",
        ),
    ],
)
def test_what_goes_wrong_is_said_with_its_numbers(fold: RunHistory, said: str) -> None:
    (sentence,) = [text for text in warnings(snapshot(fold)) if "over plan" not in text]
    assert sentence.startswith(said)


def test_the_noise_of_small_losses_is_no_jump() -> None:
    assert warnings(snapshot(steps([7.5, 6.0, 4.0, 2.0, *[0.1, 0.3] * 10]))) == []


def test_ranks_that_drift_apart_are_named() -> None:
    slow = [Event(kind="step", step=1, loss=1.0, rank=rank, own_tokens=9, busy_s=1 + rank / 2) for rank in (0, 1)]
    fold = RunHistory()
    fold.add(slow)
    assert "rank 1's passes take 50 % longer" in warnings(snapshot(fold, ranks=2))[0]


def test_memory_a_little_further_from_the_limit_is_no_warning() -> None:
    (sentence,) = warnings(snapshot(steps([2.0], memory_gib=135)))
    assert sentence.startswith("memory was 241 % over plan")


def test_a_hot_card_is_a_warning() -> None:
    card = Reading("H200", 9, 10, temperature_c=93, throttled="it is too hot")
    (sentence,) = warnings(snapshot(steps([2.0]), cards={0: (card,)}))
    assert sentence == "GPU 0 of rank 0 throttles: it is too hot (93 C)"


def test_what_the_host_says_of_ranks_comes_first_and_only_while_the_run_lives() -> None:
    fold = steps([2.0, math.nan])
    assert warnings(snapshot(fold, troubles=("rank 1 has been silent",)))[0] == "rank 1 has been silent"
    assert "rank 1 has been silent" not in warnings(
        snapshot(fold, troubles=("rank 1 has been silent",), state="failed")
    )


def test_a_row_holds_what_rank_and_beat_have_said() -> None:
    (row,) = rows(snapshot(steps([2.0], memory_gib=9), pulses={0: pulse(0, memory_bytes=7)}))
    assert (row.rank, row.gpu, row.now_bytes, row.peak_bytes, row.limit_bytes) == (0, 0, 7, 9 * GIB, 140 * GIB)
    assert (row.tokens_per_s, row.busy_s, row.beat_s) == (2048, 1.0, 3.0)


def test_a_run_that_has_ended_holds_no_memory_now() -> None:
    (row,) = rows(snapshot(steps([2.0]), pulses={0: pulse(0, memory_bytes=7)}, state="finished"))
    assert row.now_bytes is None


def test_cpu_ranks_have_no_limit_of_their_own() -> None:
    assert [row.limit_bytes for row in rows(snapshot(steps([2.0], memory_gib=999), device="cpu"))] == [None]
    (sentence,) = warnings(snapshot(steps([2.0], memory_gib=999), device="cpu"))
    assert "over plan on rank 0" in sentence


def test_a_token_costs_four_operations_a_frozen_weight_and_six_an_adapter_parameter() -> None:
    plan = snapshot(RunHistory()).plan
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    adapter = 32 * plan.spec.lora.r * (4 * 8192 + 3 * (4096 + 11008))
    scores = 6 * plan.seq_len * 4096 * 32
    assert model_flops_per_token(plan) == 4 * (32 * layer + 32000 * 4096) + 6 * adapter + scores


def test_mfu_is_of_all_gpus_and_unknown_without_a_rate() -> None:
    seen = snapshot(RunHistory(), ranks=2, matmul_flops_s=1e15)
    assert mfu(seen, 1000.0) == pytest.approx(1000 * model_flops_per_token(seen.plan) / 2e15)
    assert mfu(seen, None) is None
    assert mfu(seen._replace(matmul_flops_s=None), 1000.0) is None
    assert mfu(snapshot(RunHistory(), device="cpu", matmul_flops_s=1e15), 1000.0) is None


def test_an_alarm_lasts_for_thirty_steps_and_a_report_keeps_it() -> None:
    losses = [2.0] * 12 + [5.0] + [2.0] * 28
    assert warnings(snapshot(steps(losses))) == ["the loss jumped from 2.000 to 5.000 at step 13"]
    later = snapshot(steps([*losses, 2.0, 2.0, 2.0, 2.0]))
    assert warnings(later) == []
    assert [one.sentence for one in find_warnings(later, whole=True)] == [
        "The loss jumped from 2.000 to 5.000 at step 13."
    ]
