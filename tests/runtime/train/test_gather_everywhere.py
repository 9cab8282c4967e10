"""The same adapter comes out of every placement, ZeRO stage and number of ranks, to the byte."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qdist.core.model.gptq import Gptq, Shape
from qdist.core.spec.run_spec import nest
from qdist.host.launch import prepare
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import ADAPTER
from qdist.runtime.train.checkpoint import load
from tests.runtime.conftest import TrainRun
from tests.runtime.gptq_files import padded, save_gptq
from tests.runtime.tiny import adapted_run, real_job, save_data

TOO_SMALL = 1e-30
"""A learning rate at which a step changes no bit of any number that is not itself as small."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with a checkpoint of random numbers after step 2."""
    folder = tmp_path_factory.mktemp("gather")
    model = save_gptq(folder / "gptq", Gptq(shape=Shape(4, 32)), num_hidden_layers=3, tokenizer=padded())
    settings = {"method": "qa-lora", "steps": 2, "optim.lr": TOO_SMALL, "gpus": 1, "micro_batch": 1}
    return adapted_run(real_job(model, save_data(folder / "d.jsonl"), folder / "start", **settings))[0]


def contents(run: RunDir) -> tuple[dict[str, str], tuple[dict[str, Any], bytes]]:
    """What a run's adapter says of itself; where its tensors are, and their bytes."""
    raw = (run.adapter / ADAPTER).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    return header.pop("__metadata__"), (header, raw[end:])


@pytest.mark.parametrize(
    "grid",
    [
        {"gpus": 1},
        {"gpus": 2, "zero.stage": 0},
        {"gpus": 2, "optim.reduce_dtype": "bfloat16"},
        {"gpus": 2, "zero.stage": 1},
        {"gpus": 4, "zero.stage": 2},
        {"gpus": 2, "zero.stage": 3},
        {"gpus": 2, "zero.stage": 2, "zero.offload": "cpu"},
        {"gpus": 4, "placement": "shard"},
        {"gpus": 4, "placement": "shard", "gpus_per_group": 2, "zero.stage": 1},
        {"gpus": 2, "placement": "split", "split.schedule": "1f1b"},
        {"gpus": 4, "placement": "split", "gpus_per_group": 2, "split.schedule": "1f1b", "zero.stage": 1},
    ],
    ids=lambda grid: " ".join(str(value) for value in grid.values()),
)
def test_two_steps_anywhere_leave_the_bytes_of_the_adapter(
    train: TrainRun, start: RunDir, tmp_path: Path, grid: dict[str, Any]
) -> None:
    """Every engine takes the state, steps twice, and gives it back; what is gathered then is what went in."""
    shutil.copytree(start.path, tmp_path / "run")
    run = train(prepare.prepare_resume(RunDir(tmp_path / "run"), nest({"steps": 4, **grid})))
    assert run.checkpoint_steps()[-1] == 4
    progress, state = load(run.checkpoint(4))
    assert progress.optimizer_steps == 4
    assert any(bool(value.any()) for moments in state.moments.values() for value in moments.values())
    (said, tensors), (said_before, tensors_before) = contents(run), contents(start)
    assert tensors == tensors_before
    assert (said["step"], said_before["step"]) == ("4", "2")
