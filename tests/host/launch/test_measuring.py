"""Are the GPUs' figures judged rightly, and are broken ranks a finding rather than the end?"""

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qdist.core.errors import MachineError
from qdist.core.machine.cluster import Cluster, Rates, hypothetical
from qdist.core.text import GIB, MIB
from qdist.host.launch import measuring
from qdist.host.launch.measuring import Measured
from qdist.host.machine.doctor import Check
from qdist.host.machine.links import Port, Wiring
from tests.core.machine.test_measured import CARD, LINKS, card

NVLINK = Wiring(ports=(Port(pcie_generation=5, pcie_width=16, nvlinks=18, numa=0),) * 2, pairs=((0, 1, "NVLink"),))
TABLE = Rates(matmul_flops_s=800e12, memory_bytes_s=4e12, link_bytes_s=3e11, host_bytes_s=5e10, source="table")
TWO = hypothetical(2, 140 * GIB)
GOOD = Measured(cards=(CARD, card(rank=1)), problem="", disk_bytes_s=2e9, seconds=20.0)


def judged(found: Measured, cluster: Cluster = TWO, wiring: Wiring | None = NVLINK) -> dict[str, Check]:
    return {check.name: check for check in measuring.judge(found, cluster, wiring, tabled=lambda names: TABLE)}


def changed(**fields: Any) -> Measured:
    return msgspec.structs.replace(GOOD, **fields)


def second(**fields: Any) -> Measured:
    return changed(cards=(CARD, card(rank=1, **fields)))


def linked(**fields: Any) -> Measured:
    return second(links=msgspec.structs.replace(LINKS, **fields))


def test_good_cards_are_ok_and_nothing_is_to_be_tried() -> None:
    checks = judged(GOOD)
    assert list(checks) == ["wiring", "speed", "4 bits", "bytes", "disk"]
    assert {(check.status, check.remedy) for check in checks.values()} == {("ok", "")}


@pytest.mark.parametrize(
    ("found", "name", "status", "detail"),
    [
        (second(matmul_flops_s=500e12), "speed", "warn", "GPU 1 multiplies at 63% of the fastest"),
        (changed(cards=(card(matmul_flops_s=400e12),) * 2), "speed", "warn", "50% of what a NVIDIA H200 usually gives"),
        (second(round_trip_error=0.4), "4 bits", "fail", "GPU 1 quantizes with an error of 0.400"),
        (second(round_trip_differs=0.02), "4 bits", "fail", "GPU 1 unpacks NF4 differently from the CPU, by 2.0e-02"),
        (linked(wrong_gathered_bytes=1), "bytes", "fail", "GPU 1 got 1 of 4 bytes wrong"),
        (linked(wrong_reduced_values=7), "bytes", "fail", "GPU 1 got 7 wrong sums"),
        (linked(wrong_peer_bytes=((0, 9),)), "bytes", "fail", "9 bytes changed on the way from GPU 1 to GPU 0"),
        (linked(gather_bytes_s=5e9), "NVLink", "warn", "gather at 5.0 GB/s only"),
        (changed(problem="rank 1 died"), "links", "fail", "rank 1 died (2 of 2 GPUs measured to the end)"),
        (changed(problem="rank 1 died", cards=()), "measuring", "fail", "rank 1 died (0 of 2"),
        (changed(disk_bytes_s=1e8), "disk", "warn", "reads 0.1 GB/s"),
        (changed(disk_bytes_s=None), "disk", "warn", "no room"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(found: Measured, name: str, status: str, detail: str) -> None:
    check = judged(found)[name]
    assert (check.status, detail in check.detail, bool(check.remedy)) == (status, True, True), check


def test_a_shared_gpu_makes_the_figures_doubtful() -> None:
    gpus = (TWO.gpus[0], msgspec.structs.replace(TWO.gpus[1], free_bytes=20 * GIB))
    assert "GPU 1" in judged(GOOD, msgspec.structs.replace(TWO, gpus=gpus))["sharing"].detail


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (Cluster(device="cpu", gpus=(), cpu_count=1, memory_bytes=GIB, memory_free_bytes=GIB), "there is no GPU"),
        (hypothetical(1, 3 * GIB), "GPU 0 has 3.0 GiB free, and measuring takes 4.0 GiB"),
    ],
)
def test_where_nothing_can_be_measured_it_says_why(cluster: Cluster, message: str) -> None:
    with pytest.raises(MachineError) as caught:
        measuring.check_room(cluster)
    assert caught.value.message.startswith(message)
    assert caught.value.try_


def test_a_disk_rate_is_a_rate_and_leaves_nothing(tmp_path: Path) -> None:
    assert (measuring.disk_rate(tmp_path, size=4 * MIB) or 0) > 1e6
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_not_filled(tmp_path: Path) -> None:
    assert measuring.disk_rate(tmp_path, size=2**60) is None


DIES = """#!/bin/sh
grep -q 'rank.:1' /proc/$$/fd/$5 && echo "hello" && echo "[rank1]: RuntimeError: no NCCL here" && echo bye && exit 3
sleep 60
"""


@pytest.mark.parametrize(
    ("script", "problem"),
    [(DIES, "rank 1 ended with exit code 3: RuntimeError: no NCCL here"),
     ("#!/bin/sh\nsleep 60\n", "rank 0 1 did not come to an end within 1 s")],
)  # fmt: skip
def test_a_rank_that_dies_or_hangs_is_a_finding(
    script: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(script)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "cache"))
    found = measuring.measure(2, timeout_s=1)
    assert (found.problem, found.cards) == (problem, ())
    assert found.seconds < 30


def test_what_a_killed_measurement_left_is_cleared_and_no_word_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path))
    (tmp_path / ".measuring").mkdir()
    (tmp_path / ".measuring" / "rank007.json").write_bytes(msgspec.json.encode(card(rank=7)))

    def ranks(folder: Path, *_: object) -> str:
        (folder / "rank000.json").write_bytes(msgspec.json.encode(CARD))
        return ""

    monkeypatch.setattr(measuring, "_run_ranks", ranks)
    monkeypatch.setattr(measuring, "disk_rate", lambda folder: None)
    assert measuring.measure(1).cards == (CARD,)
    assert [path.name for path in tmp_path.iterdir()] == [".measuring.lock"]
