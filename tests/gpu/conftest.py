"""Launches on real GPUs: what tests of this folder share.

`QDIST_RANKS_PER_GPU=4 pytest tests/gpu` runs the tests of four GPUs on one: slowly, but every byte goes the same way.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qdist.host.machine.probe import ranks_per_gpu
from qdist.host.run.rundir import RunDir

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
Launch = Callable[..., RunDir]


@pytest.fixture(autouse=True)
def enough_gpus(request: pytest.FixtureRequest) -> None:
    """Skip what needs more GPUs than there are: markers gpu, gpu2 and gpu4; distinct where ranks must not share."""
    wanted = max(
        (number for number in (1, 2, 4) if request.node.get_closest_marker(f"gpu{number if number > 1 else ''}")),
        default=1,
    )
    present = torch.cuda.device_count() * (1 if request.node.get_closest_marker("distinct") else ranks_per_gpu())
    if present < wanted:
        pytest.skip(f"needs {wanted} GPU(s), and this machine has {present}")


@pytest.fixture(scope="session")
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
    """A qdist command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "qdist", *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
