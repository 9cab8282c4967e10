"""Two GPUs as two nodes of one machine, beside one launch on both: what does it cost to be two nodes?

    python -m bench.nodes_gpus [--model llama-7b] [--steps 20] [--out DIR]

Two `qdist launch --nnodes 2` with an agent and a GPU each, against one `qdist launch --gpus 2`, with equal samples a
step.
On a machine of one GPU its two ranks share it (QDIST_RANKS_PER_GPU=2) in all rows, and NCCL takes sockets between them.
With two GPUs, a last row has the two nodes exchange by sockets as well, as machines without a common bus do.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from qdist.host.machine import probe
from qdist.host.nodes.token import new_token
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir

SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
_WARM = 5
"""Steps that do not count: kernels are compiled and graphs are captured in them."""


def main() -> None:
    """Measure, and print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a further setting of all runs")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    out = asked.out or Path(tempfile.mkdtemp())
    settings = [
        "--model", asked.model, "--load-format", "dummy", "--seq-len", str(asked.seq_len),
        "--set", f"global_batch={asked.global_batch}", "--set", f"steps={asked.steps}", "--set", "zero.stage=0",
        "--set", "train.held_out=0", "--set", "train.verify_steps=0",
        *(word for each in asked.set for word in ("--set", each)),
    ]  # fmt: skip
    gpus = len(probe.cluster().gpus)
    shared = {probe.VARIABLE: "2"} if gpus == 1 else {}
    rows = {
        "one launch of two GPUs": one(settings, out / "one", shared),
        "two nodes": two(settings, out / "two", shared),
    }
    if gpus > 1:
        rows["two nodes, by sockets"] = two(settings, out / "sockets", SOCKETS)
    first = next(iter(rows.values()))
    print(f"{'':24}{'s a step':>10}{'tok/s':>10}{'of one':>9}{'predicted':>11}{'network':>9}")
    for name, run in rows.items():
        seconds, tokens, plan = *measured(run), run.plan()
        share = measured(first)[0] / seconds
        network = f"{plan.network_seconds:.3f} s" if len(plan.world.ranks_of_nodes) > 1 else ""
        print(f"{name:24}{seconds:10.4f}{tokens:10,.0f}{share:9.1%}{plan.tokens_per_second:11,.0f}{network:>9}")


def one(settings: Sequence[str], run: Path, more: Mapping[str, str]) -> RunDir:
    """A launch on both GPUs."""
    finished([started([*settings, "--gpus", "2", "--run", str(run)], run, more)])
    return RunDir(run)


def two(settings: Sequence[str], run: Path, more: Mapping[str, str]) -> RunDir:
    """Two nodes, of a GPU each."""
    nodes = ["--gpus", "1", "--run", str(run), "--nnodes", "2", "--rendezvous", "127.0.0.1:29471"]
    token = {"QDIST_TOKEN": new_token()}
    finished(
        [
            started(
                [*settings, *nodes, "--node-rank", str(number)], run.with_name(f"{run.name}{number}"),
                {**more, **token, **({} if probe.VARIABLE in more else {"CUDA_VISIBLE_DEVICES": str(number)})},
            )
            for number in range(2)
        ]
    )  # fmt: skip
    return RunDir(run)


def started(arguments: Sequence[str], log: Path, more: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """A launch whose output goes to a file beside its run."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log.with_suffix(".txt"), "wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "qdist", "launch", *arguments], env={**os.environ, **more}, stdout=said, stderr=said
        )


def finished(launches: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Wait for launches that depend on each other."""
    if any(launch.wait() for launch in launches):
        raise SystemExit("a launch failed: see the .txt files of --out")


def measured(run: RunDir) -> tuple[float, float]:
    """Median seconds of a step, and tokens/s, without the first steps."""
    steps = [event for event in Follower(run.path).new_events() if event.kind == "step" and event.rank == 0][_WARM:]
    seconds = median(event.seconds or 0.0 for event in steps)
    return seconds, median(event.tokens or 0 for event in steps) / seconds


if __name__ == "__main__":
    main()
