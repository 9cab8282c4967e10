"""Two to eight launches at once on one directory, one name, one cold cache: is each run one launch's own?

    python -m bench.chaos.together [--count 60] [--jobs 1]

Each launch has a seed of its own. On one directory exactly one may win; the plan and the adapter must be those of its
seed, and all others are told in a sentence. Where qdist chooses the names each launch gets one of its own. On a cold
cache all pack and tokenize at once, and all adapters of one seed are equal.
"""

import hashlib
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from bench.chaos.ground import Ground, has_traceback, table
from bench.chaos.trials import Task, numbered
from qdist.host.run.rundir import RunDir

DUMMY = ("--load-format", "dummy", "--gpus", "1")
TOLD = r"error: .*(being trained by another process|holds (an un|a )finished run|meanwhile)"
LONGEST_S = 300
Done = subprocess.CompletedProcess[str]


class Outcome(NamedTuple):
    """What came of one trial; faults are sentences."""

    kind: str
    launches: int
    faults: tuple[str, ...]


def main() -> None:
    """Draw a kind and a number of launches for each trial."""
    found, end = numbered(trial, "bench.chaos.together", __doc__ or "", count=60, of="Trials.")
    rows = []
    for kind in KINDS:
        of_kind = [outcome for outcome in found if outcome.kind == kind]
        faults = [fault for outcome in of_kind for fault in outcome.faults]
        launches = sum(outcome.launches for outcome in of_kind)
        rows.append((kind, len(of_kind), launches, len(faults), faults[0] if faults else "-"))
    print(table(("kind", "trials", "launches", "faults", "first"), rows))
    end(any(outcome.faults for outcome in found))


def trial(task: Task) -> Outcome:
    """One draw; a line as it ends."""
    ground, draw, number = task.ground, task.draw, task.number
    kind, launches = list(KINDS)[number % len(KINDS)], draw.randint(2, 8)
    faults = KINDS[kind](ground, launches, f"{number:03d}", draw)
    print(f"{number:3} {kind:14} {launches} launches  {'; '.join(faults) or 'as it should be'}", flush=True)
    return Outcome(kind, launches, tuple(faults))


def started(ground: Ground, commands: list[list[str]], draw: random.Random, folder: Path) -> list[Done]:
    """All at once, in a random order; how each ended."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = ground.environment()
    order = draw.sample(range(len(commands)), len(commands))
    running = {
        index: subprocess.Popen(commands[index], env=environment, cwd=folder, text=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for index in order
    }  # fmt: skip
    ended = {}
    for index, process in running.items():
        out, error = process.communicate(timeout=LONGEST_S)
        ended[index] = subprocess.CompletedProcess(process.args, process.returncode, out, error)
    return [ended[index] for index in range(len(commands))]


def one_directory(ground: Ground, launches: int, name: str, draw: random.Random) -> list[str]:
    """The winner's settings are what was trained; all others are told."""
    run = ground.folder / f"one{name}"
    commands = [ground.launch(run, *DUMMY, settings={"seed": str(seed)}) for seed in range(launches)]
    ended = started(ground, commands, draw, ground.folder)
    faults = [f"launch {n} shows a traceback" for n, done in enumerate(ended) if has_traceback(done)]
    winners = [seed for seed, done in enumerate(ended) if done.returncode == 0]
    if len(winners) != 1:
        return [*faults, f"{len(winners)} launches won"]
    told = [bool(re.search(TOLD, done.stderr)) for seed, done in enumerate(ended) if seed != winners[0]]
    faults += [f"{told.count(False)} losers were not told"] * (not all(told))
    faults += ["the plan is another launch's"] * (RunDir(run).plan().spec.seed != winners[0])
    alone = ground.folder / f"alone{winners[0]}"
    if not alone.exists():
        command = ground.launch(alone, *DUMMY, settings={"seed": str(winners[0])})
        subprocess.run(command, env=ground.environment(), check=True, capture_output=True)
    faults += ["the adapter is not that of its seed"] * (adapter(run) != adapter(alone))
    shutil.rmtree(run)
    return faults


def one_name(ground: Ground, launches: int, name: str, draw: random.Random) -> list[str]:
    """Each gets a directory, with its own settings in it."""
    folder = ground.folder / f"cwd{name}"
    ended = started(ground, [unnamed(ground, seed) for seed in range(launches)], draw, folder)
    faults, runs = [], set()
    for seed, done in enumerate(ended):
        where = re.search(r"^run +(\S+)$", done.stdout, re.MULTILINE)
        if done.returncode or where is None:
            faults.append(f"launch {seed} ended with {done.returncode}: {done.stderr.strip()[-200:]}")
            continue
        runs.add(where[1])
        run = RunDir(folder / where[1])
        faults += ["a run is another launch's"] * (run.plan().spec.seed != seed or run.result() is None)
    faults += ["two launches had one directory"] * (len(runs) != launches and not faults)
    shutil.rmtree(folder)
    return faults


def unnamed(ground: Ground, seed: int) -> list[str]:
    """A launch that leaves its run's name to qdist."""
    command = ground.launch(Path("never"), *DUMMY, settings={"seed": str(seed)})
    place = command.index("--run")
    return command[:place] + command[place + 2 :]


def cold_cache(ground: Ground, launches: int, name: str, draw: random.Random) -> list[str]:
    """Real weights, packed by all at once, to one adapter."""
    shutil.rmtree(ground.folder / "cache", ignore_errors=True)
    runs = [ground.folder / f"cold{name}-{n}" for n in range(launches)]
    ended = started(ground, [ground.launch(run, "--gpus", "1") for run in runs], draw, ground.folder)
    faults = [
        f"a launch ended with {done.returncode}: {done.stderr.strip()[-200:]}" for done in ended if done.returncode
    ]
    if not faults:
        faults += ["adapters differ"] * (len({adapter(run) for run in runs}) != 1)
    for run in runs:
        shutil.rmtree(run, ignore_errors=True)
    return faults


def adapter(run: Path) -> str:
    """SHA-256 of a run's adapter."""
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


KINDS = {"one directory": one_directory, "one name": one_name, "one cold cache": cold_cache}


if __name__ == "__main__":
    main()
