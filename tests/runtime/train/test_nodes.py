"""Runs on several nodes: the adapter of one machine's run, and the same checkpoints in every node's own directory."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from qdist.host.launch import prepare
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import ADAPTER
from tests.runtime.conftest import TrainOnNodes, TrainRun
from tests.runtime.tiny import dummy_job, machines, save_config

SHAPE: dict[str, Any] = {
    "global_batch": 4, "steps": 4, "train.save_steps": 2, "train.held_out": 0.25, "train.eval_steps": 2,
    "lora.dropout": 0.1, "micro_batch": 1,
}  # fmt: skip

WHOLE = {"zero.stage": 0}
"""The adapter's state whole on every rank: left to itself, a plan chooses by what the network costs."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(tmp_path_factory.mktemp("model"))


def contents(run: RunDir) -> dict[str, bytes]:
    """Every file of a run's checkpoints."""
    return {str(file.relative_to(run.path)): file.read_bytes() for file in run.checkpoints.glob("*/*")}


@pytest.mark.parametrize(
    ("nodes", "grid"),
    [
        ((1, 1), {"zero.stage": 0}),
        ((1, 1), {"optim.reduce_dtype": "bfloat16"}),
        ((2, 1), {"optim.reduce_dtype": "bfloat16", "global_batch": 6}),
        ((1, 1), {"zero.stage": 1}),
        ((1, 1), {"zero.stage": 2}),
        ((1, 1), {"zero.stage": 3}),
        ((1, 1), {"placement": "shard", "zero.stage": 0}),
        ((2, 2), {"placement": "shard", "gpus_per_group": 2, "zero.stage": 0}),
        ((2, 2), {"placement": "shard", "gpus_per_group": 2, "zero.stage": 2}),
        ((1, 1), {"placement": "split", "gpus_per_group": 2}),
        ((2, 2), {"placement": "split", "gpus_per_group": 2}),
        ((1, 1, 2), {"placement": "split", "gpus_per_group": 2}),
    ],
    ids=str,
)
def test_nodes_train_the_adapter_of_one_machine_and_each_keeps_its_checkpoints(
    train: TrainRun, train_on_nodes: TrainOnNodes, model: Path, tmp_path: Path, nodes: tuple[int, ...], grid: Any
) -> None:
    alone = train(dummy_job(model, tmp_path / "alone", gpus=sum(nodes), **SHAPE | grid))
    job = dummy_job(model, tmp_path / "node0", nodes=nodes, **SHAPE | grid)
    assert job.plan.world.nodes == nodes
    folders = [RunDir(tmp_path / f"node{number}") for number in range(len(nodes))]
    train_on_nodes(job, folders)
    first = folders[0]
    assert (first.adapter / ADAPTER).read_bytes() == (alone.adapter / ADAPTER).read_bytes()
    assert not any((other.adapter / ADAPTER).exists() for other in folders[1:])
    assert contents(first) == contents(alone)
    assert all(contents(other) == contents(first) for other in folders[1:])


def test_a_run_goes_on_from_what_its_nodes_keep(
    train: TrainRun, train_on_nodes: TrainOnNodes, model: Path, tmp_path: Path
) -> None:
    whole = train(dummy_job(model, tmp_path / "whole", gpus=2, **SHAPE | WHOLE))
    folders = [RunDir(tmp_path / f"node{number}") for number in range(2)]
    train_on_nodes(dummy_job(model, folders[0].path, nodes=(1, 1), **SHAPE | WHOLE | {"steps": 2}), folders)
    asked = prepare.resumed(folders[0], {"steps": 4}, here=machines((1, 1)))
    train_on_nodes(prepare.job_of(asked, prepare.prepared_for(asked)), folders)
    assert (folders[0].adapter / ADAPTER).read_bytes() == (whole.adapter / ADAPTER).read_bytes()
    assert contents(folders[1]) == contents(folders[0])


def test_nodes_whose_checkpoints_differ_are_refused(train_on_nodes: TrainOnNodes, model: Path, tmp_path: Path) -> None:
    folders = [RunDir(tmp_path / f"node{number}") for number in range(2)]
    train_on_nodes(dummy_job(model, folders[0].path, nodes=(1, 1), **SHAPE | WHOLE | {"steps": 2}), folders)
    shutil.rmtree(folders[1].checkpoint(2))
    asked = prepare.resumed(folders[0], {"steps": 4}, here=machines((1, 1)))
    job = prepare.job_of(asked, prepare.prepared_for(asked))
    with pytest.raises(AssertionError, match="rank 0 has a checkpoint of step 2, and rank 1 one of step 0"):
        train_on_nodes(job, folders)
