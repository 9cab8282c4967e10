"""Peak host memory of merging and exporting a large model: `python bench/export_memory.py --layers 1,3`.

Runs over random weights of so many layers of --model, with a random adapter of rank 64; each command is a process of
its own, and its peak is what the kernel says (ru_maxrss), libraries included. On a GPU weights are unpacked there.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

from qdist.core.composed import request_of
from qdist.core.machine.cluster import hypothetical
from qdist.core.model.aliases import config_of
from qdist.core.requests import Export, Folding, Merge
from qdist.core.spec.run_spec import nest, resolve
from qdist.core.text import GIB, format_bytes
from qdist.host.launch import claim, prepare
from qdist.host.run.rundir import RunDir
from qdist.host.tasks import handed_over
from qdist.runtime.engine.torch import State
from qdist.runtime.train import checkpoint
from qdist.runtime.train.result import gather

COMMANDS: dict[str, tuple[type[Folding], dict[str, str]]] = {
    "merge": (Merge, {}),
    "export --to lora": (Export, {"to": "lora"}),
    "export --to 16bit": (Export, {"to": "16bit"}),
}


def main() -> None:
    """Print a line for each command and number of layers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama-65b")
    parser.add_argument("--layers", default="1,3")
    parser.add_argument("--method", default="qa-lora")
    parser.add_argument("--only", default="", help="such as merge, or 16bit")
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        for layers in map(int, given.layers.split(",")):
            run = made(given.model, layers, given.method, Path(folder))
            for name, (kind, told) in COMMANDS.items():
                if given.only not in name or (given.method != "qa-lora" and name != "export --to 16bit"):
                    continue
                out = Path(folder, "out")
                began = time.monotonic()
                peak = measured(request_of(kind, {**told, "runs": (str(run.path),), "out": str(out)}))
                size = sum(file.stat().st_size for file in out.iterdir())
                took = f"{time.monotonic() - began:.0f} s"
                wrote = format_bytes(size)
                print(f"{layers:3} layers  {name:18} peak {format_bytes(peak)}, wrote {wrote}, {took}", flush=True)
                shutil.rmtree(out)


def made(model: str, layers: int, method: str, folder: Path) -> RunDir:
    """A run as it is after its last step, with random numbers for an adapter."""
    source = folder / f"config-{layers}"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({**config_of(model), "num_hidden_layers": layers}))
    settings = {"model": str(source), "run": str(folder / f"run-{layers}"), "load_format": "dummy", "steps": 1}
    settings |= {"method": method, "gpus": 1, "seq_len": 64, "global_batch": 1, "train.held_out": 0.0}
    spec = resolve(nest({**settings, "quant.group_size": 32} if method != "qlora" else settings))
    with patch("qdist.host.machine.probe.cluster", return_value=hypothetical(1, 140 * GIB, name="H200")):
        job = prepare.prepare(spec)  # as if it had been trained elsewhere: what merges it is this machine
    claim.write(job)
    plan, generator = job.plan, torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for linear in plan.facts.linears:
            block = "self_attn" if linear.reads.startswith("attention") else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{linear.name}.lora_%s.default.weight"
            tensors[name % "A"] = 0.01 * torch.randn(64, linear.inputs // plan.pool, generator=generator)
            tensors[name % "B"] = 0.01 * torch.randn(linear.outputs, 64, generator=generator)
    checkpoint.save(job.run, checkpoint.Progress(step=1, samples=0), State(tensors, {}, 1), keep=1)
    gather(job.run, step=1)
    return job.run


def measured(request: Folding) -> int:
    """Bytes of host memory that a process takes at its peak. It must end well."""
    with handed_over(request) as task:
        child = subprocess.Popen(task.command, pass_fds=task.descriptors)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{request} ended with {child.returncode}: {task.answer()}")
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
