"""What only a GPU can show: real kernels, paged optimizer state, NCCL, ZeRO's shares."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qdist.core.telemetry.events import Event, decode_lines, losses
from qdist.host.run.rundir import RunDir
from qdist.runtime.train.checkpoint import load, load_tensors
from tests.gpu.conftest import Launch, command


def events(run: RunDir) -> list[Event]:
    return decode_lines(run.event_file(0).read_bytes())


def adapter(run: RunDir) -> dict[str, torch.Tensor]:
    return load_tensors(run.adapter / "adapter_model.safetensors")


PAGED = {"dtype": "bfloat16", "optim.name": "paged-adamw"}


def plain_run(launch: Launch) -> RunDir:
    return launch("nf4-bfloat16", **PAGED)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "bits", "dtype"),
    [("nf4", 4, "bfloat16"), ("fp4", 4, "float16"), ("int8", 8, "float16"), ("plain", 16, "bfloat16")],
)
def test_every_kind_of_backbone_trains_finitely(launch: Launch, kind: str, bits: int, dtype: str) -> None:
    quant = {"quant.type": kind} if kind == "fp4" else {}
    run = plain_run(launch) if kind == "nf4" else launch(f"{kind}-{dtype}", bits=bits, dtype=dtype, **quant)
    found = losses(events(run))
    assert list(found) == [1, 2, 3, 4]
    assert all(0 < loss < 12 for loss in found.values())
    assert found[4] < found[1] + 0.3
    assert sum(event.skipped for event in events(run)) < 3
    assert any(float(tensor.abs().max()) > 1e-4 for name, tensor in adapter(run).items() if "lora_B" in name)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["paged-adamw", "adamw-8bit", "adamw"])
def test_every_optimizer_goes_on_bit_for_bit(launch: Launch, optimizer: str) -> None:
    """As if the run had been killed behind the checkpoint of step 2. At rank 64 matrices have moments in 8 bits."""
    own = {"dtype": "bfloat16", "optim.name": optimizer, "optim.lr_ratio_b": 4.0, "lora.r": 64}
    whole = plain_run(launch) if optimizer == "paged-adamw" else launch(f"whole-{optimizer}", **own)
    assert whole.plan().optimizer == optimizer
    resumed = RunDir(whole.path.with_name(f"resumed-{optimizer}"))
    shutil.copytree(whole.path, resumed.path)
    (resumed.path / "result.json").unlink()
    shutil.rmtree(resumed.adapter)
    shutil.rmtree(resumed.checkpoint(4))
    command("launch", "--resume", "--run", str(resumed.path))
    assert losses(events(resumed)) == losses(events(whole))
    (_, first), (_, second) = load(whole.checkpoint(4)), load(resumed.checkpoint(4))
    assert first.optimizer_steps == second.optimizer_steps == 4
    assert all(torch.equal(first.parameters[name], second.parameters[name]) for name in first.parameters)
    for moment, named in first.moments.items():
        assert all(torch.equal(value, second.moments[moment][name]) for name, value in named.items())


@pytest.mark.gpu2
def test_two_gpus_train_the_adapter_of_one(launch: Launch) -> None:
    one, two = plain_run(launch), launch("two", gpus=2, **PAGED, **{"zero.stage": 2})
    assert two.plan().zero_stage == 2
    first, second = adapter(one), adapter(two)
    for name in first:
        assert float((first[name] - second[name]).norm()) < 0.1 * float(first[name].norm()), name
    assert list(losses(events(two)).values()) == pytest.approx(list(losses(events(one)).values()), rel=1e-3)


COUNT_MOMENTS = """
import os, sys
import torch
from qdist.host.run.rundir import RunDir
from qdist.runtime.engine.torch import Adapter, MicroBatch
from qdist.runtime.placements.base import make_engine
from qdist.runtime.train.setup import make_accelerator, pick_devices

run = RunDir(sys.argv[1])
plan = run.plan()
(device,) = pick_devices(plan, int(os.environ["RANK"]))
accelerator = make_accelerator(plan, run)
layer = torch.nn.Linear(64, 64, bias=False, device=device)
adapter = Adapter(layer, lambda batch: layer(batch).square().sum())
engine = make_engine(plan, accelerator, adapter)
micro_batch = MicroBatch(lambda: torch.ones(2, 64, device=device), 0)
engine.accumulate([micro_batch], weight=1.0, loss_scale=1.0)
engine.step(1e-3, 1.0)
names = ("exp_avg", "state1")
held = sum(state[name].numel() for state in engine.optimizer.state.values() for name in names if name in state)
open(run.path / f"held{os.environ['RANK']}", "w").write(str(held))
torch.distributed.destroy_process_group()
"""


@pytest.mark.gpu2
def test_under_zero_2_each_rank_holds_half_of_the_moments(launch: Launch, tmp_path: Path) -> None:
    run = launch("two", gpus=2, **PAGED, **{"zero.stage": 2})
    (tmp_path / "count.py").write_text(COUNT_MOMENTS)
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*starter, str(tmp_path / "count.py"), str(run.path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [int((run.path / f"held{rank}").read_text()) for rank in (0, 1)] == [64 * 64 // 2] * 2
