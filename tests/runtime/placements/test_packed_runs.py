"""Runs of packed micro-batches have the losses of the run with a row a sample, in every placement."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qdist.core.telemetry.events import Event
from qdist.host.launch import prepare
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import PLAN, RunDir
from tests.runtime.tiny import real_job, save_data, save_model

TrainRun = Callable[[prepare.Launch], RunDir]
SHAPE: dict[str, Any] = {
    "seq_len": 64, "global_batch": 8, "micro_batch": 2, "steps": 3, "lora__r": 4, "optim__lr": 3e-3, "bits": 4,
    "train__held_out": 0.1,
}  # fmt: skip
LAID: dict[str, dict[str, Any]] = {
    "one rank": {"gpus": 1},
    "replicate, recomputed": {"placement": "replicate", "gpus": 2, "train__checkpointing": True},
    "shard": {"placement": "shard", "gpus": 2},
    "split": {"placement": "split", "gpus": 2, "micro_batch": 4},
}


@pytest.fixture(scope="module")
def job_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], prepare.Launch]:
    folder = tmp_path_factory.mktemp("packed")
    model, data = save_model(folder / "model", num_hidden_layers=4), save_data(folder / "data.jsonl")
    return lambda settings: real_job(model, data, unused(folder), **(SHAPE | settings))


def unused(folder: Path) -> Path:
    return folder / f"run{len(list(folder.iterdir()))}"


def packed(job: prepare.Launch) -> prepare.Launch:
    plan = msgspec.structs.replace(job.plan, packed=True)
    return job._replace(plan=plan, files=job.files | {PLAN: msgspec.json.encode(plan).decode()})


def events_of(run: RunDir, kind: str) -> list[Event]:
    return [event for event in Follower(run.path).new_events() if event.rank == 0 and event.kind == kind]


@pytest.fixture(scope="module")
def unpacked(job_of: Any, train: TrainRun) -> RunDir:
    return train(job_of({"gpus": 1}))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAID)
def test_a_packed_run_is_the_unpacked_one(name: str, job_of: Any, train: TrainRun, unpacked: RunDir) -> None:
    run = train(packed(job_of(LAID[name])))
    for own, wanted in zip(events_of(run, "step"), events_of(unpacked, "step"), strict=True):
        assert own.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert own.gradient_norm == pytest.approx(wanted.gradient_norm, rel=1e-4)
        assert own.learning_rate == wanted.learning_rate
        assert own.tokens == wanted.tokens
    for own, wanted in zip(events_of(run, "eval"), events_of(unpacked, "eval"), strict=True):
        assert own.held_out_loss == pytest.approx(wanted.held_out_loss, rel=1e-5)
