"""Where the time from `qdist launch` to the first step goes: `python bench/start.py`, for a random 7B on one GPU.

    python bench/start.py [--model llama-7b] [--gpus 1] [--at-once 1] [--load-format dummy] [--data FILE]

Launches it twice, so that the second finds files and kernels in caches; `--at-once 4` starts four on a GPU each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Print the phases of each launch, in seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--gpus", default="1")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--data", default="")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="qdist-start-"))
    for turn in ("first", "second"):
        runs = [folder / f"{turn}{number}" for number in range(given.at_once)]
        began = time.time()
        started = [subprocess.Popen(command(given, run), env=environment(given, n)) for n, run in enumerate(runs)]
        if any(process.wait() for process in started):
            raise SystemExit("a launch failed")
        for run in runs:
            show(turn, run, began)


def command(given: argparse.Namespace, run: Path) -> list[str]:
    """Two steps of 2x512, without an evaluation where the weights are random."""
    words = ["-m", "qdist", "launch", "--gpus", given.gpus, "--model", given.model, "--run", str(run)]
    words += ["--set", "steps=2", "--set", "global_batch=2", "--set", "seq_len=512"]
    if given.data:
        return [sys.executable, *words, "--data", given.data, "--set", "train.answers=0"]
    return [sys.executable, *words, "--load-format", given.load_format, "--set", "train.held_out=0.0"]


def environment(given: argparse.Namespace, number: int) -> dict[str, str]:
    """One GPU each where several start at once."""
    return {**os.environ, **({"CUDA_VISIBLE_DEVICES": str(number)} if given.at_once > 1 else {})}


def show(turn: str, run: Path, began: float) -> None:
    """One line: before the plan, then each phase."""
    result = json.loads((run / "result.json").read_text())
    planned = (run / "plan.json").stat().st_mtime - began
    phases = {"planning": planned, **result["starting"]}
    words = " + ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())
    print(f"{turn:7} {run.name:8} first step after {sum(phases.values()):5.1f} s = {words}", flush=True)


if __name__ == "__main__":
    main()
