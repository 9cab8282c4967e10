"""A sharded backbone trains the adapter of one process, from the same bytes, and every rank holds its share alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdist.core.telemetry.events import Event, losses
from qdist.host.launch import prepare
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir
from qdist.runtime.train.checkpoint import load_tensors
from tests.runtime.tiny import dummy_job, save_config

pytestmark = pytest.mark.slow
TrainRun = Callable[[prepare.Launch], RunDir]

SHAPE: dict[str, Any] = {
    "seq_len": 16, "global_batch": 8, "micro_batch": 1, "steps": 6, "lora__r": 4, "optim__lr": 3e-3,
    "train__held_out": 0.1, "train__save_steps": 4, "train__keep": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return save_config(folder / "model", num_hidden_layers=3)


@pytest.fixture(scope="module")
def alone(train: TrainRun, model: Path, folder: Path) -> Callable[[int], RunDir]:
    """One process, for each number of bits once."""
    done: dict[int, RunDir] = {}

    def run(bits: int) -> RunDir:
        if bits not in done:
            done[bits] = train(dummy_job(model, folder / f"alone-{bits}", gpus=1, bits=bits, **SHAPE))
        return done[bits]

    return run


def events(run: RunDir, rank: int = 0) -> list[Event]:
    return [event for event in Follower(run.path).new_events() if event.rank == rank]


def agree(run: RunDir, other: RunDir) -> None:
    """Losses, held-out losses and adapters are the same."""
    one, two = losses(events(run)), losses(events(other))
    assert len(one) == 6
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-4)
    held_out = [
        {event.step: event.held_out_loss for event in events(each) if event.kind == "eval"} for each in (run, other)
    ]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)
    assert held_out[0]
    counted, wanted_counts = run.result(), other.result()
    assert counted is not None
    assert wanted_counts is not None
    assert counted["inventory"] == wanted_counts["inventory"]
    assert counted["gradients"] == wanted_counts["gradients"] != ""
    first, second = (load_tensors(each.adapter / "adapter_model.safetensors") for each in (run, other))
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_shards_train_the_adapter_of_one_process(
    train: TrainRun, model: Path, folder: Path, alone: Callable[[int], RunDir], bits: int
) -> None:
    job = dummy_job(model, folder / f"sharded-{bits}", gpus=2, bits=bits, placement="shard", **SHAPE)
    assert (job.plan.placement, job.plan.groups, job.plan.gpus_per_group) == ("shard", 1, 2)
    run = train(job)
    agree(run, alone(bits))
    checked = [event.note for event in events(run) if event.kind == "load"]
    assert checked[0].endswith("gathered are the bytes that the ranks hold")


@pytest.mark.parametrize("settings", [{"gpus": 4, "gpus_per_group": 2}, {"gpus": 3, "global_batch": 9}], ids=str)
def test_groups_and_uneven_shards_do_too(train: TrainRun, model: Path, folder: Path, settings: dict[str, int]) -> None:
    """Three ranks divide neither rows nor bytes evenly."""
    shape = {**SHAPE, "global_batch": settings.get("global_batch", 8)}
    name = f"{settings['gpus']}"
    single = train(dummy_job(model, folder / f"single-{name}", gpus=1, **shape))
    run = train(dummy_job(model, folder / f"grid-{name}", placement="shard", zero__stage=1, **(shape | settings)))
    agree(run, single)


def test_tied_tables_stay_whole_and_learn_the_same(train: TrainRun, folder: Path) -> None:
    model = save_config(folder / "tied", num_hidden_layers=2, tie_word_embeddings=True)
    single = train(dummy_job(model, folder / "tied-alone", gpus=1, **SHAPE))
    agree(train(dummy_job(model, folder / "tied-sharded", gpus=2, placement="shard", **SHAPE)), single)


def test_a_run_goes_on_in_shards(train: TrainRun, model: Path, folder: Path, alone: Callable[[int], RunDir]) -> None:
    path = folder / "moved"
    shutil.copytree(alone(4).path, path)
    (path / "result.json").unlink()
    shutil.rmtree(path / "adapter")
    moved = RunDir(path)
    shutil.rmtree(moved.checkpoint(6))
    job = prepare.prepare_resume(moved, {"gpus": 2, "placement": "shard"})
    agree(train(job), alone(4))


def test_what_is_read_back_differs_from_what_is_held_only_where_bytes_were_changed(
    fork_ranks: Callable[..., list[int]], model: Path, folder: Path
) -> None:
    """The check at the start of a run names the tensor of which one rank has gathered another byte."""
    assert fork_ranks("tests.runtime.corrupt_shard", 2, model) == [0, 0]
    for rank in range(2):
        answer = json.loads((folder / f"corrupt-{rank}.json").read_text())
        assert answer["intact_bytes"] > 100_000
        assert "model.layers.1.self_attn.q_proj.weight" in answer["error"]
