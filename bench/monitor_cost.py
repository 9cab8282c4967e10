"""What watching costs: `python bench/monitor_cost.py --pairs 5`.

One run, beside which `qdist monitor` is attached and taken away again on a terminal of its own: each pair is a window
of time with it and one without, so that both see the same process, clocks and temperature. Eight layers of Llama-7B on
a GPU, where a step takes 0.1 s and every millisecond beside it shows. Nothing is left out of a window but the step in
which it begins.
"""

import argparse
import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from qdist.core.model.aliases import config_of

WARM_STEPS = 15
SIZES = ((200, 50), (80, 24))
"""Of the terminal, one after the other."""


def main() -> None:
    """Print a line a pair, and the mean difference."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--window", type=float, default=6.0, help="seconds")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--capture", type=Path, help="folder for what the monitor wrote: `cat` it on such a terminal")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qdist-watch-") as name:
        windows, steps = watched(given, Path(name))
    differences = []
    for pair, (attached_at, detached_at, ended_at) in enumerate(windows, 1):
        beside, alone = speed(steps, attached_at, detached_at), speed(steps, detached_at, ended_at)
        differences.append(100 * (beside / alone - 1))
        print(f"pair {pair}: watched {beside:,.0f} tok/s, alone {alone:,.0f}: {differences[-1]:+.2f} %", flush=True)
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    print(f"{len(differences)} pairs: {mean(differences):+.2f} % +- {error:.2f} (standard error)")


def watched(given: argparse.Namespace, folder: Path) -> tuple[list[tuple[float, float, float]], list[dict[str, Any]]]:
    """(attached, detached, end) of each pair, and the steps of rank 0."""
    process = started(given, folder)
    events = folder / "run/events/rank000.jsonl"
    try:
        while not events.is_file() or len(steps_in(events)) < WARM_STEPS:
            if process.poll() is not None:
                raise SystemExit(f"the run ended with {process.returncode}")
            time.sleep(0.2)
        windows = []
        for pair in range(given.pairs):
            began = time.time()
            size = SIZES[pair % len(SIZES)]
            capture = given.capture / f"monitor-{size[0]}x{size[1]}.raw" if given.capture else None
            monitor = attached(folder / "run", size, capture)
            time.sleep(given.window)
            monitor.terminate()
            monitor.wait()
            middle = time.time()
            time.sleep(given.window)
            windows.append((began, middle, time.time()))
        return windows, steps_in(events)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def started(given: argparse.Namespace, folder: Path) -> "subprocess.Popen[bytes]":
    """A run without an end."""
    (folder / "config.json").write_text(json.dumps({**config_of(given.model), "num_hidden_layers": given.layers}))
    command = [sys.executable, "-m", "qdist", "launch", "--gpus", str(given.gpus), "--model", str(folder)]
    command += ["--load-format", "dummy", "--run", str(folder / "run")]
    shape = {"global_batch": given.micro_batch * given.gpus, "micro_batch": given.micro_batch, "train.held_out": 0.0,
             "train.save_steps": 10**6, "steps": 10**6}  # fmt: skip
    command += [f"--set={key}={value}" for key, value in shape.items()]
    environment = {**os.environ, "QDIST_CACHE": str(folder / "cache")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=folder)


def steps_in(events: Path) -> list[dict[str, Any]]:
    """What was said of each step; a line that is being written is left out."""
    lines = events.read_text().rpartition("\n")[0].splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "step"]


def speed(steps: list[dict[str, Any]], began: float, ended: float) -> float:
    """Tokens/s of the steps between two moments."""
    inside = [step for step in steps if began < step["time"] - step["seconds"] and step["time"] <= ended]
    return sum(step["tokens"] for step in inside) / sum(step["seconds"] for step in inside)


def attached(run: Path, size: tuple[int, int], capture: Path | None) -> "subprocess.Popen[bytes]":
    """`qdist monitor` on a pseudo terminal whose other end is read, and kept or thrown away."""
    ours, theirs = pty.openpty()
    columns, rows = size
    command = ["sh", "-c", f"stty cols {columns} rows {rows}; exec {sys.executable} -m qdist monitor {run}"]
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    threading.Thread(target=_drain, args=(ours, capture), daemon=True).start()
    return process


def _drain(descriptor: int, capture: Path | None) -> None:
    with open(capture or os.devnull, "wb") as file:
        try:
            while piece := os.read(descriptor, 1 << 16):
                file.write(piece)
        except OSError:  # how Linux says that the other end was closed
            os.close(descriptor)


if __name__ == "__main__":
    main()
