"""Do prediction and measurement stand side by side, with the error a person would compute?"""

from typing import Any

import msgspec
import pytest

from qdist.cli.views.plan import outcome_rows, start_line
from qdist.core.machine.cluster import Machine
from qdist.core.planning.plan import Plan, RankPlan
from qdist.core.text import GIB
from tests.plans import CPU, gpus, planned


def budget(plan: Plan, total_bytes: int) -> Any:
    one = plan.ranks[0].expected[0]
    zeros = dict.fromkeys(one.__struct_fields__, 0)
    return msgspec.convert({**zeros, "weights": total_bytes}, type=type(one))


def plan_of(*predicted_gib: float, cpu: bool = False, gpus_a_rank: int = 1) -> Plan:
    made = planned("smollm2-135m", CPU if cpu else gpus(1, 140), {"gpus": 1})
    expected = [budget(made, int(gib * GIB)) for gib in predicted_gib]
    cut = range(0, len(expected), gpus_a_rank)
    ranks = tuple(
        RankPlan(
            rank=rank,
            node=0,
            gpus=() if cpu else tuple(range(first, first + gpus_a_rank)),
            expected=tuple(expected[first : first + gpus_a_rank]),
        )
        for rank, first in enumerate(cut)
    )
    return msgspec.structs.replace(made, ranks=ranks, tokens_per_second=5000.0, load_peak_bytes=20 * GIB)


def result_of(*measured_gib: float, load_gib: float = 19.0, gpus_a_rank: int = 1, **more: Any) -> dict[str, Any]:
    peaks = [
        {"allocated": int((gib - 1) * GIB), "context": GIB, "reserved": 0, "load": int(load_gib * GIB)}
        for gib in measured_gib
    ]
    cut = range(0, len(peaks), gpus_a_rank)
    return {
        "peaks": [peaks[first : first + gpus_a_rank] for first in cut],
        "tokens_per_s": {"measured": 4800.0},
        **more,
    }


@pytest.mark.parametrize("gpus_a_rank", [1, 2])
def test_gpus_that_differ_have_a_row_each(gpus_a_rank: int) -> None:
    rows = outcome_rows(plan_of(22, 24, gpus_a_rank=gpus_a_rank), result_of(22, 23, gpus_a_rank=gpus_a_rank))
    assert rows == [
        ("memory of GPU 0", "22.0 GiB", "22.0 GiB", "+0.0 %"),
        ("memory of GPU 1", "24.0 GiB", "23.0 GiB", "+4.3 %"),
        ("memory while loading", "20.0 GiB", "19.0 GiB", "+5.3 %"),
        ("tokens/s", "5,000", "4,800", "+4.2 %"),
    ]


def test_gpus_that_are_alike_are_one_row() -> None:
    rows = outcome_rows(plan_of(24, 24, 24, 24), result_of(25, 25.2, 25.1, 25))
    assert rows[0] == ("memory of the fullest of 4 GPUs", "24.0 GiB", "25.2 GiB", "-4.8 %")
    assert len(rows) == 3


def test_one_gpu_that_strays_brings_all_rows_back() -> None:
    assert len(outcome_rows(plan_of(24, 24, 24, 24), result_of(25, 25, 25, 29))) == 6


def test_cpu_ranks_are_judged_by_memory_alone() -> None:
    assert outcome_rows(plan_of(1.4, 1.4, cpu=True), result_of(1.4, 1.3)) == [
        ("memory of rank 0", "1.4 GiB", "1.4 GiB", "+0.0 %"),
        ("memory of rank 1", "1.4 GiB", "1.3 GiB", "+7.7 %"),
    ]


def test_what_was_not_predicted_has_no_error() -> None:
    plan = msgspec.structs.replace(plan_of(24), tokens_per_second=0.0, load_peak_bytes=0)
    assert outcome_rows(plan, result_of(24))[1:] == [
        ("memory while loading", "-", "19.0 GiB", ""),
        ("tokens/s", "-", "4,800", ""),
    ]
    assert len(outcome_rows(plan, result_of(24, load_gib=0, tokens_per_s={"measured": None}))) == 1


def test_the_way_to_the_first_step_says_where_the_time_went() -> None:
    result = {"start_seconds": {"load": 9.0, "first_step": 12.0}, "starting": {"imports": 5.14, "first step": 3.0}}
    assert start_line(result) == "first step after 12 s (imports 5.1, first step 3.0); loading 0 s"


@pytest.mark.parametrize(
    ("first", "seconds", "read_bytes", "line"),
    [
        (42.3, 31.0, 36 * 10**9, "first step after 42 s; loading 31 s, 33.5 GiB read at 1.2 GB/s"),
        (42.3, 2.0, 36 * 10**9, "first step after 42 s; loading 2 s, 33.5 GiB read at 18 GB/s"),
        (9.0, 30.0, 2 * 10**9, "first step after 9 s; loading 30 s, 1.9 GiB read at 67 MB/s"),
        (9.0, 30.0, 36 * 10**6, "first step after 9 s; loading 30 s, 34.3 MiB read at 1.2 MB/s"),
        (9.0, 30.0, 13 * 10**5, "first step after 9 s; loading 30 s, 1.2 MiB read"),
        (9.0, 3.0, 0, "first step after 9 s; loading 3 s"),
        (None, 0.0, 0, ""),
    ],
)
def test_the_way_to_the_first_step_is_one_line(first: float | None, seconds: float, read_bytes: int, line: str) -> None:
    assert start_line({
        "start_seconds": {"load": 40.0, "first_step": first},
        "loading": {"seconds": seconds, "read_bytes": read_bytes},
    }) == line  # fmt: skip


def test_gpus_of_several_nodes_are_named_with_their_nodes() -> None:
    own = plan_of(20.0, 30.0)
    ranks = tuple(msgspec.structs.replace(rank, node=rank.rank, gpus=(0,)) for rank in own.ranks)
    plan = msgspec.structs.replace(own, ranks=ranks, nodes=(Machine(name="a", gpus=1), Machine(name="b", gpus=1)))
    labels = [label for label, *_ in outcome_rows(plan, result_of(20.0, 30.0))]
    assert labels[:2] == ["memory of GPU 0 of a", "memory of GPU 0 of b"]
