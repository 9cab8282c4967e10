"""Launcher, agent and ranks killed within 100 ms of a start: is anything left after 5 s, and does the run go on?

    python -m bench.chaos.starts [--count 60] [--jobs 1]

`agent` is qdist.host.launch.agent. Time counts from the moment at which the victim, or what it starts, was first seen:
half of the trials count from the agent's start, half from the first rank's. In one trial of five the same launch is
given again afterwards, and must reach its end.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from bench.chaos.ground import left, processes, qdist, table
from bench.chaos.trials import Task, numbered
from qdist.host.run.rundir import RunDir

VICTIMS = ("launcher", "agent", "rank", "all")
LONGEST_S = 120


class Outcome(NamedTuple):
    """One trial. orphans: processes that were left after 5 s. again: how the launch after it ended; None where none."""

    victim: str
    after: str
    orphans: int
    again: int | None


def main() -> None:
    """Draw victim, what is waited for, and a delay for each trial."""
    found, end = numbered(trial, "bench.chaos.starts", __doc__ or "", count=60, of="Kills.")
    rows = []
    for victim in VICTIMS:
        of = [outcome for outcome in found if outcome.victim == victim]
        again = [outcome.again for outcome in of if outcome.again is not None]
        rows.append((victim, len(of), sum(outcome.orphans for outcome in of), f"{again.count(0)} of {len(again)}"))
    print(table(("victim", "trials", "left after 5 s", "went on"), rows))
    end(any(outcome.orphans or outcome.again for outcome in found))


def trial(task: Task) -> Outcome:
    """Start, wait for the agent or a rank, kill after a moment, look."""
    ground, draw, number = task.ground, task.draw, task.number
    run = ground.folder / f"start{number:03d}"
    victim, after, delay_s = VICTIMS[number % 4], draw.choice(("agent", "rank")), draw.uniform(0, 0.1)
    command = ground.launch(run, "--load-format", "dummy", "--gpus", "2")
    launcher = subprocess.Popen(
        command,
        env=ground.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    pattern, end = (
        {"agent": "qdist.host.launch.agent", "rank": "qdist.runtime.train.worker"}[after],
        time.monotonic() + LONGEST_S,
    )
    while not pids(run, pattern, rank=after == "rank") and launcher.poll() is None:
        if time.monotonic() > end:
            raise SystemExit(f"{run}: no {after} within {LONGEST_S} s")
    time.sleep(delay_s)
    found = {
        "launcher": [launcher.pid],
        "agent": pids(run, "qdist.host.launch.agent", rank=False),
        "rank": pids(run, "qdist.runtime.train.worker", rank=True)[:1]
        or pids(run, "qdist.host.launch.agent", rank=False),
        "all": [launcher.pid, *processes(str(run))],
    }[victim]
    for pid in found:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(5)
    orphans = left(str(run), max(0.0, 5 - (time.monotonic() - began)))
    again = None
    if number % 5 == 0:
        anew = qdist("launch", "--resume", "--run", str(run)) if RunDir(run).exists() else command
        again = subprocess.run(
            anew, env=ground.environment(), capture_output=True, timeout=LONGEST_S, check=False
        ).returncode
    said = f"{len(orphans)} left" + (f", went on: {again}" if again is not None else "")
    print(f"{number:3} {victim:8} {1000 * delay_s:3.0f} ms after the {after}: {said}", flush=True)
    for pid in orphans:
        print(f"      {orphans[pid][:150]}")
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(run, ignore_errors=True)
    return Outcome(victim, after, len(orphans), again)


def pids(run: Path, words: str, *, rank: bool) -> list[int]:
    """Of the agent, or of its ranks: both have the worker's name in their command line."""
    found = {pid: line for pid, line in processes(str(run)).items() if words in line}
    return [pid for pid, line in found.items() if ("qdist.host.launch.agent" in line) != rank]


if __name__ == "__main__":
    main()
