"""What watching costs: `python bench/monitor_cost.py --pairs 5 [--without CHECKOUT]`.

Each pair is the same run twice: here with `qdist monitor` attached on a terminal of its own, and without it; with
--without, the second run's code is that of another checkout, such as one from before ranks had beats and stopwatches.
Eight layers of Llama-7B on a GPU, where a step takes 0.1 s and every millisecond beside it shows.
"""

import argparse
import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import mean, median, stdev

from qdist.core.models import config_of

UNSTEADY = 10
"""First steps, which are left out."""


def main() -> None:
    """Print a line a pair, and the mean difference."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--without", type=Path, help="a checkout for the runs that nobody watches")
    given = parser.parse_args()
    differences = []
    for pair in range(given.pairs):
        order = (True, False) if pair % 2 else (False, True)
        speeds = {watched: run(given, watched=watched) for watched in order}
        differences.append(100 * (speeds[True] / speeds[False] - 1))
        print(f"pair {pair + 1}: watched {speeds[True]:,.0f} tok/s, alone {speeds[False]:,.0f}: "
              f"{differences[-1]:+.2f} %", flush=True)  # fmt: skip
    spread = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    print(f"{len(differences)} pairs: {mean(differences):+.2f} % +- {spread:.2f} (standard error)")


def run(given: argparse.Namespace, *, watched: bool) -> float:
    """Median tokens/s of the steps of one run."""
    folder = Path(tempfile.mkdtemp(prefix="qdist-watch-"))
    (folder / "config.json").write_text(json.dumps({**config_of(given.model), "num_hidden_layers": given.layers}))
    command = [sys.executable, "-m", "qdist", "launch", "--gpus", str(given.gpus), "--model", str(folder)]
    command += ["--load-format", "dummy", "--run", str(folder / "run")]
    shape = (
        f"global_batch={16 * given.gpus} micro_batch=16 train.held_out=0.0 train.save_steps=9999 steps={given.steps}"
    )
    for setting in shape.split():
        command += ["--set", setting]
    environment = {**os.environ, "QDIST_CACHE": str(folder / "cache")}
    if not watched and given.without:
        environment["PYTHONPATH"] = f"{given.without.resolve()}:{environment.get('PYTHONPATH', '')}"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=folder)
    monitor = attached(folder / "run") if watched else None
    code = process.wait()
    if monitor is not None:
        monitor.terminate()
        monitor.wait()
    if code:
        raise SystemExit(f"a run ended with {code}")
    lines = (folder / "run/events/rank000.jsonl").read_text().splitlines()
    steps = [event for event in map(json.loads, lines) if event["kind"] == "step"][UNSTEADY:]
    shutil.rmtree(folder)
    return median(event["tokens"] / event["seconds"] for event in steps)


def attached(path: Path) -> "subprocess.Popen[bytes]":
    """`qdist monitor` on a pseudo terminal of 200 x 50 whose other end is read and thrown away."""
    while not (path / "plan.json").is_file():
        time.sleep(0.05)
    ours, theirs = pty.openpty()
    command = ["sh", "-c", f"stty cols 200 rows 50; exec {sys.executable} -m qdist monitor {path}"]
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    threading.Thread(target=_drain, args=(ours,), daemon=True).start()
    return process


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 1 << 16):
            pass
    except OSError:  # how Linux says that the other end was closed
        os.close(descriptor)


if __name__ == "__main__":
    main()
