"""What Python takes to launch the kernels of a training pass on this GPU, and which functions take it.

    python bench/launches.py [--model llama-7b] [--tokens 64,512,2048,8192]

Random weights. A micro-batch of few tokens leaves the GPU idle, so its time is Python's; where the time grows with the
tokens, the GPU is the slower one.
"""

import argparse
import cProfile
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from qdist.host.run.rundir import RunDir

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29411"}


def main() -> None:
    """Time both passes at each number of tokens, then profile the smallest."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--tokens", default="64,512,1024,2048,4096,8192")
    parser.add_argument("--top", type=int, default=25)
    arguments = parser.parse_args()
    run = RunDir(Path(tempfile.mkdtemp(prefix="qdist-launches-")) / "run")
    command = [sys.executable, "-m", "qdist", "launch", "--gpus", "1", "--model", arguments.model]
    command += ["--bits", arguments.bits, "--load-format", "dummy", "--run", str(run.path)]
    for setting in (
        "steps=1",
        "global_batch=1",
        "seq_len=64",
        "train.held_out=0.0",
        "train.checkpointing=false",
        "dtype=bfloat16",
    ):
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    os.environ.update(ALONE)
    forward, layers, device = model_of(run)
    for tokens in map(int, arguments.tokens.split(",")):
        there, back = seconds(forward, batch_of(forward, tokens, device), device)
        print(f"{tokens:6} tokens  forward {1e3 * there / layers:6.2f} ms a layer, backward {1e3 * back / layers:6.2f}")
    batch = batch_of(forward, 64, device)
    counted(forward, batch, layers, device, arguments.top)


def model_of(run: RunDir) -> tuple:
    """(its loss, number of layers, device) of the run's plan, in this process."""
    from qdist.runtime.placements.registry import placement_of
    from qdist.runtime.train.setup import assemble, load_part, make_accelerator, pick_devices

    plan = run.plan()
    devices = pick_devices(plan, 0)
    accelerator = make_accelerator(plan, run)
    place = placement_of(plan, 0, devices)
    parts = assemble(place, accelerator, load_part(place).backbone, pad_id=0)
    return parts.forward, plan.facts.layer_count, devices[0]


def batch_of(forward: object, tokens: int, device: torch.device) -> dict:
    """Random tokens, in rows of at most 512."""
    rows, length = max(1, tokens // 512), min(tokens, 512)
    ids = torch.randint(0, 500, (rows, length), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(forward: object, batch: dict, device: torch.device, times: int = 7) -> tuple[float, float]:
    """Medians of the forward and the backward pass, each until the GPU is done."""
    found = []
    for _ in range(times):
        wait(device)
        began = time.perf_counter()
        loss = forward.loss(batch)
        wait(device)
        turned = time.perf_counter()
        loss.backward()
        wait(device)
        found.append((turned - began, time.perf_counter() - turned))
    return median(there for there, _ in found), median(back for _, back in found)


def counted(forward: object, batch: dict, layers: int, device: torch.device, top: int) -> None:
    """Print the functions that take longest, and how many operators and kernels a layer has."""
    torch.autograd.set_multithreading_enabled(False)  # or the profiler does not see the backward pass
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(3):
        forward.loss(batch).backward()
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(top)
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    with trace(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traced:
        forward.loss(batch).backward()
        wait(device)
    rows = sorted(traced.key_averages(), key=lambda row: -row.self_cpu_time_total)[:top]
    for row in rows:
        print(
            f"{row.key[:60]:60} {row.count / layers:7.1f} a layer, {row.self_cpu_time_total / row.count:8.1f} us each"
        )


if __name__ == "__main__":
    main()
