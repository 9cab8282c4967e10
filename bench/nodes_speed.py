"""What a network of 1 Gbit/s and 1 ms costs runs of two hosts, beside what the plan says: seconds and bytes a step.

    python bench/nodes_speed.py [--only WORD,WORD] [--rate 1e9] [--latency 0.001] [--steps 24] [--json FILE]

Hosts are namespaces (tests/nodes/bed.py): each link is limited by tbf, each packet is held by a relay in the place of
the switch. `qdist doctor --hosts` measures that network first, as a user would, and the plan is made with what it
found. Bytes are the kernel's counts of the first host's link between two steps. The prediction is the step without
limit and what the plan says that the limited network adds to it. On a machine of 2 cores four ranks take turns.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tests.nodes.bed import Bed, wait_for, why_not
from tests.nodes.hosts_run import HostsRun, hosts_toml, save_tiny

_WAIT_S, _FIRST = 240.0, 6
"""_FIRST: the step from which on they are timed and counted."""
_COMMON = {"load_format": "dummy", "bits": 16, "train.held_out": 0.0, "train.save_steps": 10_000}
_MODELS: dict[str, Mapping[str, Any]] = {
    "tiny": {"seq_len": 64, "global_batch": 8, "micro_batch": 4, "lora.r": 8},
    "smollm2": {"model": "smollm2-135m", "seq_len": 64, "global_batch": 4, "micro_batch": 2, "lora.r": 16},
}
_LAYOUTS: dict[str, tuple[int, Mapping[str, Any]]] = {
    "replicate": (1, {"placement": "replicate"}),
    "shard within": (2, {"placement": "shard", "gpus_per_group": 2, "micro_batch": 2}),
    "shard across": (1, {"placement": "shard", "gpus_per_group": 2}),
    "split across": (1, {"placement": "split", "gpus_per_group": 2, "micro_batch": 2}),
}
"""Ranks of each host, and the settings."""


class Measured(NamedTuple):
    """One run: seconds of a step (median), bytes that the first host sent a step, and what its plan says of both."""

    step_s: float
    bytes_step: float
    said_bytes: int
    said_s: float
    network: str


def main() -> None:
    """Print a row for each model and layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--rate", type=float, default=1e9, help="bits/s of each link, each way")
    parser.add_argument("--latency", type=float, default=1e-3, help="seconds that a packet takes")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    rows = []
    seconds, sizes = (
        f"{'free s':>8} {'slow s':>8} {'said s':>8} {'off':>6}",
        f"{'MB/step':>9} {'said MB':>9} {'off':>6}",
    )
    print(f"{'':22} {seconds} {sizes}  network")
    for name in (f"{model} {layout}" for model in _MODELS for layout in _LAYOUTS):
        if any(word in name for word in given.only.split(",")):
            free, slow = measured(name, given, limited=False), measured(name, given, limited=True)
            rows.append({"name": name, "free": free._asdict(), "slow": slow._asdict()})
            print(line(name, free, slow), flush=True)
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1))


def line(name: str, free: Measured, slow: Measured) -> str:
    """One row: seconds a step without limit, with it and as predicted; bytes a step as counted and as the plan says."""
    said = free.step_s + slow.said_s - free.said_s
    sent, said_bytes = slow.bytes_step / 1e6, slow.said_bytes / 1e6
    return (
        f"{name:22} {free.step_s:8.3f} {slow.step_s:8.3f} {said:8.3f} {said / slow.step_s - 1:+6.0%} "
        f"{sent:9.3f} {said_bytes:9.3f} {said_bytes / sent - 1:+6.0%}  {slow.network}"
    )


def measured(name: str, given: argparse.Namespace, *, limited: bool) -> Measured:
    """One run over two hosts."""
    model, layout = name.split(" ", 1)
    ranks, placement = _LAYOUTS[layout]
    with tempfile.TemporaryDirectory(prefix="qdist-nodes-") as text:
        folder = Path(text)
        tiny = {"model": str(save_tiny(folder / "model"))}
        settings = {**_COMMON, **tiny, **_MODELS[model], **placement, "steps": given.steps}
        variables = {"": {"QDIST_CACHE": str(folder / "own/cache"), "CUDA_VISIBLE_DEVICES": ""}}
        with Bed(folder / "bed", ["ash", "birch"], own=[folder / "own"], environ=variables) as bed:
            if limited:
                bed.limit(given.rate / 8)
                bed.delay(given.latency)
            run = HostsRun(bed, folder / "own/run", settings, gpus=dict.fromkeys(bed.hosts, ranks))
            doctor(bed)
            return followed(run)


def doctor(bed: Bed) -> None:
    """Have the network measured, for the plan."""
    file = bed.folder / "doctor.toml"
    file.write_text(hosts_toml(bed, 1, 60, {}))
    next(iter(bed.hosts.values())).done(sys.executable, "-P", "-m", "qdist", "doctor", "--hosts", file)


def followed(run: HostsRun) -> Measured:
    """Start a run, count between two of its steps, and see it to its end."""
    first = next(iter(run.bed.hosts.values()))
    launch = run.launch()
    counts = []
    for step in (_FIRST, run.settings["steps"] - 2):
        wait_for(lambda step=step: run.last_step() >= step or launch.poll() is not None, seconds=_WAIT_S, what="step")
        counts.append((run.last_step(), run.bed.traffic()[first.name].sent))
    if launch.wait(_WAIT_S):
        sys.exit(run.said())
    (since, before), (to, after) = counts
    plan = json.loads((first.disk(run.run) / "plan.json").read_text())
    seconds = [event["seconds"] for event in run.steps() if event["kind"] == "step" and event["step"] > _FIRST]
    network = plan["network"]
    return Measured(
        step_s=median(seconds),
        bytes_step=(after - before) / max(to - since, 1),
        said_bytes=plan.get("network_bytes", 0),
        said_s=plan.get("network_seconds", 0.0),
        network=f"{network['bytes_s'] * 8 / 1e9:.2f} Gbit/s, {network['latency_s'] * 1e3:.2f} ms, {network['source']}",
    )


if __name__ == "__main__":
    main()
