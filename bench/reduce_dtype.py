"""Losses of runs whose gradients cross in 16 bits, with and without error feedback, beside float32's.

    python bench/reduce_dtype.py [--model NAME] [--data FILE] [--steps 100] [--seeds 2]

Two CPU ranks of this machine, started by this script: the run without feedback is no setting of qdist's.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch

from qdist.core.planning.plan import digest
from qdist.core.spec.run_spec import nest, resolve
from qdist.core.telemetry.events import losses
from qdist.host.launch import claim, prepare
from qdist.host.launch.agent import variables_of
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir
from qdist.runtime.engine import torch as engine
from qdist.runtime.engine.reduction import NarrowSum
from qdist.runtime.train import worker

RANKS = 2
WAYS = {"float32": "float32", "bfloat16": "bfloat16", "no feedback": "bfloat16"}
"""Columns of the table, by the setting `optim.reduce_dtype`."""


def main() -> None:
    """Train each way from each seed, and print training losses and held-out losses."""
    if sys.argv[1] == "--rank":
        _work(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m", help="an alias, or a folder with a model's files")
    parser.add_argument("--data", type=Path, default=Path("shared/data/sharegpt_500.json"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    given = parser.parse_args()
    print(f"{'way':12} seed  held out: before  after | mean loss of the last tenth | largest step's difference")
    for seed in range(given.seeds):
        plain: dict[int, float] = {}
        for way in given.ways:
            held_out, steps = trained(given, seed, way)
            plain = plain or steps
            last = mean(loss for step, loss in steps.items() if step > 0.9 * given.steps)
            apart = max(abs(loss - plain[step]) for step, loss in steps.items())
            figures = f"{held_out[0]:.5f} {held_out[-1]:.5f} | {last:.5f} | {apart:.5f}"
            print(f"{way:12} {seed:4}  {figures}", flush=True)


def trained(given: argparse.Namespace, seed: int, way: str) -> tuple[list[float], dict[int, float]]:
    """Held-out losses of a run, and its loss by step."""
    settings = {
        "model": given.model, "data.path": str(given.data), "seed": seed, "steps": given.steps, "gpus": RANKS,
        "seq_len": given.seq_len, "global_batch": given.batch, "train.held_out": 24, "train.save_steps": given.steps,
        "lora.r": 8, "optim.lr": 3e-4, "zero.stage": 0, "optim.reduce_dtype": WAYS[way], "placement": "replicate",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qdist-reduce-") as folder:
        job = prepare.prepare(resolve(nest({**settings, "run": f"{folder}/run"})))
        claim.write(job)
        _start_ranks(way, [str(job.run.path), "--digest", digest(job.plan)], job.run)
        events = [event for event in Follower(job.run.path).new_events() if event.rank == 0]
        result: dict[str, Any] = job.run.result() or {}
        return [loss for _, loss in result["held_out"]], losses(events)


def _start_ranks(way: str, words: list[str], run: RunDir) -> None:
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        command = [sys.executable, "-u", __file__, "--rank", way, *words]
        shell = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        places = [shell | dict(variables_of(rank, RANKS, kept.getsockname())) for rank in range(RANKS)]
        ranks = [subprocess.Popen(command, env=place) for place in places]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            sys.exit("\n".join(run.log_file(rank).read_text()[-2000:] for rank in range(RANKS)))


class _Forgetful(NarrowSum):
    """Rounds as `NarrowSum` does, and drops what that leaves."""

    def add_up(self, numbers: torch.Tensor, *, scale: float) -> None:
        self.forget()
        super().add_up(numbers, scale=scale)


def _work(way: str, words: list[str]) -> None:
    sys.argv = ["worker", *words]
    with mock.patch.object(engine, "NarrowSum", _Forgetful if way == "no feedback" else NarrowSum):
        worker.main()


if __name__ == "__main__":
    main()
