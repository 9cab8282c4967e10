"""Is what a run taught kept, and is the next plan told of it?"""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qdist.core.machine.calibration import CalibrationSample, Correction
from qdist.core.machine.cluster import Cluster, Rates
from qdist.core.planning.plan import DataFacts, Plan
from qdist.core.planning.process_memory import graph_bytes
from qdist.core.text import GIB, MIB
from qdist.host.run import calibration
from qdist.host.run.rundir import PLAN, RESULT, RunDir
from tests.core.machine.test_calibration import LESSON
from tests.plans import CPU, gpus, planned

SETTINGS = {"placement": "replicate", "gpus": 2, "gpus_per_group": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("QDIST_CACHE", str(folder))
    folder.mkdir()
    return folder


def machine() -> Cluster:
    rates = Rates(matmul_flops_s=1e12, memory_bytes_s=1e12, link_bytes_s=1e9, host_bytes_s=1e9, source="measured today")
    return msgspec.structs.replace(gpus(2, 140), rates=rates)


def plan(**changes: Any) -> Plan:
    made = planned("llama-7b", machine(), SETTINGS)
    return msgspec.structs.replace(made, **{"tokens_per_second": 1000.0, **changes})


def result(plan: Plan, *, context_bytes: int = 2 * GIB, tokens_s: float | None = 900.0) -> dict[str, Any]:
    pageable = plan.ranks[0].expected[0].pageable
    context = context_bytes + pageable + plan.graphs * graph_bytes(plan.facts.layer_count)
    peaks = [
        [{"allocated": (8 + rank.rank) * GIB, "context": context, "reserved": 10 * GIB, "load": GIB}]
        for rank in plan.ranks
    ]
    return {"steps": 5, "peaks": peaks, "tokens_per_s": {"predicted": 1000.0, "measured": tokens_s}}


def finished(folder: Path, plan: Plan, content: dict[str, Any]) -> RunDir:
    folder.mkdir()
    (folder / PLAN).write_bytes(msgspec.json.encode(plan))
    (folder / RESULT).write_text(json.dumps(content))
    return RunDir(folder)


def test_what_a_run_taught_corrects_the_next_plan(tmp_path: Path) -> None:
    made = plan()
    assert calibration.correction_for(machine()) is None
    learnt = calibration.learn(finished(tmp_path / "run", made, result(made)), cluster=machine())
    assert learnt is not None
    assert (learnt.card, learnt.gpus, learnt.world_size, learnt.rates) == ("hypothetical GPU", 2, 2, "measured")
    assert learnt.measured_bytes == 11 * GIB + made.ranks[0].expected[0].pageable + graph_bytes(32)
    assert learnt.measured_context_bytes == 2 * GIB
    assert learnt.predicted_context_bytes == made.ranks[0].expected[0].context - graph_bytes(32)
    wanted = Correction(speed=0.9, speeds=(("replicate", 0.9),), context_bytes=2 * GIB, runs=1)
    assert calibration.correction_for(machine()) == wanted
    assert calibration.correction_for(machine(), world_size=1) == msgspec.structs.replace(wanted, context_bytes=None)
    assert calibration.correction_for(machine(), bits=8) == Correction(context_bytes=2 * GIB, runs=1)


def test_only_plans_that_tell_tokens_from_padding_teach_speed() -> None:
    facts = DataFacts(path="c", samples=10, train_samples=9, held_out_samples=1, tokens=2560, longest=512)
    padded = planned("llama-7b", machine(), {**SETTINGS, "pack": False}, data=facts)
    older = msgspec.structs.replace(padded, fill=None)
    for made, share in ((padded, 0.5), (older, 0.0), (plan(), 1.0)):
        learnt = calibration.lesson_of(made, result(made), machine())
        assert learnt is not None
        assert learnt.useful_share == share


def test_ratios_to_the_tables_rates_say_nothing_of_measured_ones(tmp_path: Path) -> None:
    made = plan()
    calibration.learn(finished(tmp_path / "run", made, result(made)), cluster=machine())
    rates = machine().rates
    assert rates is not None
    tabled = msgspec.structs.replace(machine(), rates=msgspec.structs.replace(rates, source="table: H200"))
    assert calibration.correction_for(tabled) == Correction(context_bytes=2 * GIB, runs=1)


def test_a_corrected_prediction_is_remembered_uncorrected() -> None:
    """900 were measured where the formulas gave 1,000; the next plan says 900, and the lesson must stay 0.9."""
    corrected = plan(tokens_per_second=900.0, correction=Correction(speed=0.5, speeds=(("replicate", 0.9),)))
    learnt = calibration.lesson_of(corrected, result(corrected), machine())
    assert learnt is not None
    assert learnt.predicted_tokens_s == pytest.approx(1000.0)
    assert learnt.measured_tokens_s == 900.0


@pytest.mark.parametrize(
    ("measured", "predicted", "pageable", "context"),
    [
        (GIB, GIB, 0, GIB),
        (100 * MIB, GIB, 0, 100 * MIB),
        (2 * GIB, GIB, GIB, GIB),
        (GIB, GIB, GIB, None),
    ],
)
def test_paged_moments_are_no_context(measured: int, predicted: int, pageable: int, context: int | None) -> None:
    assert calibration._context(measured, predicted, pageable) == context


def test_cpu_ranks_and_unfinished_runs_teach_nothing(tmp_path: Path, cache: Path) -> None:
    cpu = planned("smollm2-135m", CPU)
    run = finished(tmp_path / "cpu", cpu, result(cpu))
    assert calibration.learn(run, cluster=CPU) is None
    made = plan()
    run = finished(tmp_path / "gpu", made, result(made))
    (run.path / RESULT).unlink()
    assert calibration.learn(run, cluster=machine()) is None
    assert calibration.correction_for(CPU) is None
    assert not list(cache.iterdir())


def numbered(number: int) -> CalibrationSample:
    return msgspec.structs.replace(LESSON, seq_len=number)


def test_a_torn_line_costs_itself_alone(cache: Path) -> None:
    calibration.append(numbered(1))
    with open(cache / calibration.FILE, "ab") as file:
        file.write(b'{"card": "NVIDIA H2')
    assert calibration.read() == (numbered(1),)
    calibration.append(numbered(2))
    with open(cache / calibration.FILE, "ab") as file:
        file.write(b'{"of": "another version"}\n\xff\xfe\n')
    assert calibration.read() == (numbered(1), numbered(2))


def test_the_newest_lessons_are_kept(cache: Path) -> None:
    line = msgspec.json.encode(numbered(0)) + b"\n"
    (cache / calibration.FILE).write_bytes(line * 600)
    calibration.append(numbered(7))
    found = calibration.read()
    assert (len(found), found[-1]) == (500, numbered(7))
    calibration.append(numbered(8))
    assert len(calibration.read()) == 501
