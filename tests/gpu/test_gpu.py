"""What only a GPU can show: real kernels, paged optimizer state, NCCL, ZeRO's shares."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.events import Event, decode_lines, losses
from qdist.host.rundir import RunDir
from qdist.runtime.checkpoint import load, load_tensors

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
Launch = Callable[..., RunDir]


@pytest.fixture(autouse=True)
def enough_gpus(request: pytest.FixtureRequest) -> None:
    wanted = 2 if request.node.get_closest_marker("gpu2") else 1
    if torch.cuda.device_count() < wanted:
        pytest.skip(f"needs {wanted} GPU(s), and this machine has {torch.cuda.device_count()}")


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Trains random weights through the command line; a run of the same name is trained once."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA))
    done: dict[str, RunDir] = {}

    def train(name: str, *, gpus: int = 1, bits: int = 4, **settings: Any) -> RunDir:
        if name not in done:
            run = RunDir(folder / name)
            common = {"seq_len": 64, "global_batch": 8, "micro_batch": 4, "steps": 4, "optim.lr": 1e-2, "lora.r": 8}
            chosen = {**common, "train.save_steps": 2, "train.held_out": 0.0, **settings}
            flags = [f"--set={key}={value}" for key, value in chosen.items()]
            model = ["--model", str(folder / "model"), "--load-format", "dummy"]
            command("launch", *model, "--bits", str(bits), "--gpus", str(gpus), "--run", str(run.path), *flags)
            done[name] = run
        return done[name]

    return train


def command(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qdist", *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


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
def test_paged_adamw_goes_on_bit_for_bit(launch: Launch) -> None:
    """As if the run had been killed behind the checkpoint of step 2."""
    whole = plain_run(launch)
    assert whole.plan().optimizer == "paged-adamw"
    resumed = RunDir(whole.path.with_name("resumed"))
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
    one, two = plain_run(launch), launch("two", gpus=2, **PAGED)
    assert two.plan().zero_stage == 2
    first, second = adapter(one), adapter(two)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-3
    assert list(losses(events(two)).values()) == pytest.approx(list(losses(events(one)).values()), rel=1e-3)


COUNT_MOMENTS = """
import os, sys
import torch
from qdist.host.rundir import RunDir
from qdist.runtime.engine import Adapter
from qdist.runtime.setup import make_accelerator, make_engine, pick_devices

run = RunDir(sys.argv[1])
plan = run.plan()
(device,) = pick_devices(plan, int(os.environ["LOCAL_RANK"]))
accelerator = make_accelerator(plan, run)
layer = torch.nn.Linear(64, 64, bias=False, device=device)
adapter = Adapter(layer, lambda batch: layer(batch).square().sum())
engine = make_engine(plan, accelerator, adapter)
engine.backward(torch.ones(2, 64, device=device), weight=1.0, loss_scale=1.0, last=True)
engine.step(1e-3, 1.0)
names = ("exp_avg", "state1")
held = sum(state[name].numel() for state in engine.optimizer.state.values() for name in names if name in state)
open(run.path / f"held{os.environ['RANK']}", "w").write(str(held))
torch.distributed.destroy_process_group()
"""


@pytest.mark.gpu2
def test_under_zero_2_each_rank_holds_half_of_the_moments(launch: Launch, tmp_path: Path) -> None:
    run = launch("two", gpus=2, **PAGED)
    (tmp_path / "count.py").write_text(COUNT_MOMENTS)
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*starter, str(tmp_path / "count.py"), str(run.path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [int((run.path / f"held{rank}").read_text()) for rank in (0, 1)] == [64 * 64 // 2] * 2
