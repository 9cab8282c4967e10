"""Every placement on real GPUs trains the adapter of one GPU: 20 losses, held-out losses and the adapter itself."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qdist.core.telemetry.events import losses
from qdist.host.run.rundir import RunDir
from tests.gpu.conftest import Launch
from tests.gpu.test_gpu import adapter, events

SHAPE = {
    "dtype": "bfloat16", "steps": 20, "micro_batch": 1, "train.held_out": 0.1, "train.eval_steps": 10, "optim.lr": 1e-3,
}  # fmt: skip
"""At a rate of 1e-2 a rounding that turns the sign of a small gradient moves a weight as far as training does."""


def agree(run: RunDir, other: RunDir) -> None:
    assert list(losses(events(run)).values()) == pytest.approx(list(losses(events(other)).values()), rel=1e-3)
    held_out = [[event.held_out_loss for event in events(each) if event.held_out_loss] for each in (run, other)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-3)
    first, second = adapter(run), adapter(other)
    for name in first:
        assert float((first[name] - second[name]).norm()) < 0.1 * float(first[name].norm()), name


def alone(launch: Launch, bits: int) -> RunDir:
    return launch(f"alone-{bits}", bits=bits, **SHAPE)


@pytest.mark.gpu2
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_shards_train_the_adapter_of_one_gpu(launch: Launch, bits: int) -> None:
    run = launch(f"shard-{bits}", gpus=2, bits=bits, placement="shard", **{**SHAPE, "train.verify_steps": 7})
    agree(run, alone(launch, bits))
    checked = [event.note for event in events(run) if event.kind in ("load", "verify")]
    assert len(checked) == 3
    assert all(note.endswith("gathered are the bytes that the ranks hold") for note in checked)


@pytest.mark.gpu2
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_shards_compute_the_bits_of_a_whole_backbone(launch: Launch, bits: int) -> None:
    """In the environment of a run, its allocator included."""
    once = {**SHAPE, "steps": 1}
    sharded = launch(f"sharded-{bits}", gpus=2, bits=bits, placement="shard", **{**once, "zero.stage": 0})
    whole = launch(f"whole-{bits}", bits=bits, **once)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("same_bits.py")), str(sharded.path), str(whole.path)],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.gpu2
def test_undivided_data_parallelism_trains_the_adapter_of_one_gpu(launch: Launch) -> None:
    run = launch("ddp", gpus=2, **{**SHAPE, "zero.stage": 0})
    assert run.plan().engine == "torch"
    agree(run, alone(launch, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 16])
def test_layers_in_host_memory_train_the_same_adapter(launch: Launch, bits: int) -> None:
    away = {"placement": "split", "split.schedule": "sequential", "split.offload_layers": 2}
    run = launch(f"offload-{bits}", bits=bits, **SHAPE, **away)
    assert len(run.plan().offloaded_layers) == 2
    agree(run, alone(launch, bits))


@pytest.mark.gpu2
def test_one_process_over_two_gpus_trains_the_same_adapter(launch: Launch) -> None:
    run = launch("sequential", gpus=2, placement="split", **SHAPE, **{"split.schedule": "sequential"})
    assert (run.plan().world_size, run.plan().ranks[0].gpus) == (1, (0, 1))
    agree(run, alone(launch, 4))


@pytest.mark.gpu4
@pytest.mark.parametrize("placement", ["shard", "split"])
def test_groups_train_the_adapter_of_one_gpu(launch: Launch, placement: str) -> None:
    grid: dict[str, Any] = {"placement": placement, "gpus_per_group": 2, "zero.stage": 2}
    run = launch(f"groups-{placement}", gpus=4, **SHAPE, **grid)
    assert (run.plan().groups, run.plan().gpus_per_group) == (2, 2)
    agree(run, alone(launch, 4))
