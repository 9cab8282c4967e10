"""Is the adapter of several hosts that of one host, bit for bit? A row for each model, number of hosts and placement.

    python bench/nodes_equal.py [--only "WORDS;WORDS"] [--json FILE]

Hosts are namespaces with disks of their own (tests/nodes/bed.py), started over ssh by `qdist launch --hosts`; beside
them the same run by `qdist launch --gpus N` on one host. All ranks have one thread, which sums of floats depend on.
Compared are the tensors of the adapter and the loss of each step.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from qdist.host.run.rundir import RunDir
from tests.nodes.bed import Bed, wait_for, why_not
from tests.nodes.hosts_run import HostsRun, largest_difference, save_tiny

_COMMON: Mapping[str, Any] = {
    "bits": 4, "seq_len": 64, "global_batch": 12, "micro_batch": 1, "lora.r": 4, "train.held_out": 0.0, "zero.stage": 0,
    "train.answers": 0,
}  # fmt: skip
_GROUPS: Mapping[str, Mapping[str, Any]] = {
    "replicate": {"placement": "replicate"},
    "shard within": {"placement": "shard", "gpus_per_group": 2},
    "split across": {"placement": "split"},
}
_WAIT_S = 300.0


class Grid(NamedTuple):
    """Hosts, ranks of each, and the way in which their ranks hold the model."""

    hosts: int
    each: int
    placement: str

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the placement."""
        own = dict(_GROUPS[self.placement])
        return own | ({"gpus_per_group": self.hosts * self.each} if self.placement == "split across" else {})


_GRIDS = [
    Grid(hosts, each, name)
    for hosts in (2, 3)
    for each in (1, 2)
    for name in _GROUPS
    if each > 1 or "within" not in name
]


def main() -> None:
    """Compare them, and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--data", type=Path, help="records for SmolLM2; random tokens and weights without")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    rows = []
    for model in ("tiny", "smollm2"):
        for grid in _GRIDS:
            name = f"{model}, {grid.hosts} hosts x {grid.each}, {grid.placement}"
            if any(word in name for word in given.only.split(";")):
                found = compared(model, grid, given.data)
                rows.append({"name": name, **found})
                print(f"{name:36} {json.dumps(found)}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


def compared(model: str, grid: Grid, data: Path | None) -> dict[str, Any]:
    """Both runs, and what is different between them."""
    core = min(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="qdist-equal-") as name:
        folder = Path(name)
        settings = {**_COMMON, **grid.settings, **_of_model(model, folder, data)}
        environ = {"": {"QDIST_CACHE": str(folder / "own/cache"), "CUDA_VISIBLE_DEVICES": ""}}
        names = ["ash", "birch", "cedar"][: grid.hosts]
        with Bed(folder / "bed", names, own=[folder / "own"], environ=environ, cores=[[core]] * grid.hosts) as bed:
            run = HostsRun(bed, folder / "own/run", settings, gpus=dict.fromkeys(names, grid.each))
            with run.launch() as launch:
                code = launch.wait(_WAIT_S)
            if code != 0:
                sys.exit(run.said())
            wait_for(lambda: not run.left(), seconds=20, what="end of all processes")
            first = bed.hosts["ash"]
            words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
            count = str(grid.hosts * grid.each)
            alone = folder / "own/alone"
            ran = first.run(
                [sys.executable, "-P", "-m", "qdist", "launch", "--gpus", count, "--run", str(alone), *words]
            )
            if ran.returncode != 0:
                sys.exit(ran.stdout + ran.stderr)
            return _difference(run, RunDir(first.disk(alone)), bed)


def _of_model(model: str, folder: Path, data: Path | None) -> dict[str, Any]:
    if model == "tiny":
        return {"model": str(save_tiny(folder / "model", num_hidden_layers=6)), "load_format": "dummy", "steps": 20}
    if data is None:
        return {"model": "smollm2-135m", "load_format": "dummy", "steps": 3}
    return {"model": "smollm2-135m", "data": str(data), "steps": 3}


def _difference(run: HostsRun, alone: RunDir, bed: Bed) -> dict[str, Any]:
    own = load_file(alone.adapter / "adapter_model.safetensors")
    most, equal = 0.0, True
    for host in bed.hosts.values():
        there = load_file(host.disk(run.run) / "adapter/adapter_model.safetensors")
        equal = equal and all(torch.equal(there[name], tensor) for name, tensor in own.items())
        most = max(most, *((there[name] - tensor).abs().max().item() for name, tensor in own.items()))
    losses = {
        event["step"]: event["loss"]
        for event in map(json.loads, (alone.event_file(0)).read_text().splitlines())
        if event["kind"] == "step"
    }
    return {"bit for bit": equal, "adapter off by": most, "losses off by": largest_difference(run.losses(), losses)}


if __name__ == "__main__":
    main()
