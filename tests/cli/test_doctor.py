"""`qdist doctor --gpus` as a person reads it; what it measures is tested with `host.measuring` and `runtime.rates`."""

import shlex
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner

from qdist.cli import doctor
from qdist.cli.main import main
from qdist.core.machine.cluster import Cluster
from qdist.core.nodes.pairs import Pair
from qdist.core.text import GIB
from qdist.host.launch import measuring
from qdist.host.machine import links, nvml, probe
from qdist.host.machine.doctor import Check, diagnose
from tests.core.machine.test_measured import CARD, LINKS, card
from tests.host.machine.test_doctor import changed
from tests.host.machine.test_doctor import cluster as machine

CARDS = tuple(
    nvml.Card(uuid=f"GPU-{n}", position=n, name="H200", total_bytes=140 * GIB, free_bytes=139 * GIB) for n in (0, 1)
)
DRIVER = nvml.Driver(version="580.1", cuda=(13, 0), cards=CARDS)
GOOD = measuring.Measured(cards=(CARD, card(rank=1)), problem="", disk_bytes_s=2e9, seconds=21.4)


@pytest.fixture(autouse=True)
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def cluster() -> Cluster:
        gpus = probe.visible(CARDS, None)
        return Cluster(device="cuda", gpus=gpus, cpu_count=8, memory_bytes=GIB, memory_free_bytes=GIB)

    monkeypatch.setattr(nvml, "read", lambda: DRIVER)
    monkeypatch.setattr(probe, "cluster", cluster)
    monkeypatch.setattr(links, "read", lambda uuids: None)
    monkeypatch.setattr(doctor, "look", lambda: None)
    monkeypatch.setattr(doctor, "diagnose", lambda facts: (Check("Python", "ok", "3.11"),))


def measured(monkeypatch: pytest.MonkeyPatch, found: measuring.Measured) -> click.testing.Result:
    monkeypatch.setattr(measuring, "measure", lambda ranks: found)
    return CliRunner().invoke(main, ["doctor", "--gpus"], prog_name="qdist")


def test_rates_are_shown_judged_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(monkeypatch, GOOD)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:5] == [
        "measuring 2 x H200",
        "",
        "GPU  bf16 products     memory  from host  all-gather  all-reduce    copies  launching",
        "  0    790 TFLOP/s  4000 GB/s    55 GB/s    300 GB/s    250 GB/s  200 GB/s    0.90 ms",
        "  1    790 TFLOP/s  4000 GB/s    55 GB/s    300 GB/s    250 GB/s  200 GB/s    0.90 ms",
    ]
    assert "fit for training (measured in 21 s)" in lines
    kept = probe.measured_rates(["H200", "H200"], "580.1")
    assert kept is not None
    assert (kept.link_bytes_s, kept.source.split()[0]) == (300e9, "measured")


def test_gpus_that_alter_bytes_are_not_trained_on_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = msgspec.structs.replace(LINKS, wrong_peer_bytes=((0, 12345),))
    result = measured(monkeypatch, msgspec.structs.replace(GOOD, cards=(CARD, card(rank=1, links=wrong))))
    assert result.exit_code == 1
    assert "12,345 bytes changed on the way from GPU 1 to GPU 0" in result.stdout
    assert "these GPUs alter what they send each other: train on one of them" in result.stdout
    assert probe.measured_rates(["H200", "H200"], "580.1") is None


def test_links_that_could_not_be_measured_fail_and_the_cards_are_still_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = tuple(card(rank=rank, host_bytes_s=None, links=None) for rank in (0, 1))
    result = measured(monkeypatch, msgspec.structs.replace(GOOD, cards=alone, problem="rank 0 ended with exit code 1"))
    assert result.exit_code == 1
    assert "GPU  bf16 products     memory  launching\n  0    790 TFLOP/s  4000 GB/s    0.90 ms\n" in result.stdout
    assert "not fit for training until mended: links" in result.stdout


def test_a_machine_that_cannot_run_is_mended_first(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = (Check("Python", "ok", "3.11"), Check("torch", "fail", "not installed", "pip install torch"))
    monkeypatch.setattr(doctor, "diagnose", lambda facts: checks)
    result = measured(monkeypatch, GOOD)
    assert result.exit_code == 1
    assert result.stdout.startswith("fail  torch  not installed\n")
    assert "measuring" not in result.stdout


def test_what_a_machine_without_gpus_is_told_to_try_is_a_plan() -> None:
    checks = diagnose(changed(driver=None, cluster=machine()))
    program, *words = shlex.split(next(check.remedy for check in checks if check.name == "driver"))
    result = CliRunner().invoke(main, words, prog_name=program)
    assert result.exit_code == 0, result.output


def test_the_network_of_hosts_is_a_table_with_a_row_for_each_pair() -> None:
    pair = Pair(addresses=("1", "2"), latency_s=0.0005, one_bytes_s=(125e6, 1e9), four_bytes_s=(250e6, 2e9))
    assert doctor.network_table([pair], {"1": "ash", "2": "birch"}) == (
        "      hosts  latency  1 connection         back  4 connections          back\n"
        "ash - birch  0.50 ms   1.00 Gbit/s  8.00 Gbit/s    2.00 Gbit/s  16.00 Gbit/s"
    )
