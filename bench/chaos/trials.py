"""Trials drawn from a seed, several at a time in processes of their own, bounded in number and in minutes."""

import argparse
import fcntl
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bench.chaos.ground import Ground

Task = TypeVar("Task")
Done = TypeVar("Done")


def parser(module: str, text: str, *, count: int, of: str) -> argparse.ArgumentParser:
    """What every bench of the suite takes. count: its default. of: what there are so many of."""
    options = argparse.ArgumentParser(prog=f"python -m {module}", description=text)
    options.add_argument("--count", type=int, default=count, help=f"{of}  [default: {count}]")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=1, help="At a time, each on its share of the cores.  [default: 1]")
    options.add_argument("--minutes", type=float, default=60, help="Begin no trial after so many.  [default: 60]")
    options.add_argument("--keep", action="store_true", help="Leave the folder where it is.")
    return options


def folder_for(name: str) -> Path:
    """A new folder for a bench's trials."""
    return Path(tempfile.mkdtemp(prefix=f"qdist-chaos-{name}-")).resolve()


def each(
    trial: Callable[[Task], Done], tasks: Iterable[Task], *, folder: Path, jobs: int, minutes: float
) -> Iterator[tuple[Task, Done | BaseException]]:
    """What came of each trial as it ends; of one that raised, what it raised. Says when it stops for lack of time."""
    end, waiting = time.monotonic() + 60 * minutes, iter(tasks)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_settle, initargs=(folder, jobs)) as pool:
        running: dict[Future[Done], Task] = {}
        while True:
            while len(running) < jobs and time.monotonic() < end and (task := next(waiting, None)) is not None:
                running[pool.submit(trial, task)] = task
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.exception() or future.result()
    if left := sum(1 for _ in waiting):
        print(f"{left} trials were not begun: {minutes:g} minutes are over", flush=True)


class Task(NamedTuple):
    """A trial that is told its number alone. Trials of one worker share a ground, one after the other."""

    folder: Path
    seed: str
    number: int

    @property
    def ground(self) -> Ground:
        return Ground(self.folder / f"ground{place()}")

    @property
    def draw(self) -> random.Random:
        return random.Random(self.seed)


def numbered(
    trial: Callable[[Task], Done], module: str, text: str, *, count: int, of: str
) -> tuple[list[Done], Callable[[bool], None]]:
    """Run a bench whose trials need a number and a seed; what came of them, and how to end, with whether one missed.

    Raises what a trial raised.
    """
    given, found, began = parser(module, text, count=count, of=of).parse_args(), [], time.monotonic()
    folder = folder_for(module.rpartition(".")[2])
    tasks = (Task(folder, f"{given.seed} {number}", number) for number in range(given.count))
    for _, outcome in each(trial, tasks, folder=folder, jobs=given.jobs, minutes=given.minutes):
        if isinstance(outcome, BaseException):
            raise outcome
        found.append(outcome)
    took = time.monotonic() - began
    print(f"{len(found)} of {given.count} trials in {took:.0f} s, {given.jobs} at once, seed {given.seed}", flush=True)
    return found, lambda missed: finish(folder, keep=given.keep, missed=missed)


def place() -> int:
    """The number of this worker among those that are at work."""
    return int(os.environ[_PLACE])


_PLACE = "QDIST_CHAOS_PLACE"


def _settle(folder: Path, jobs: int) -> None:
    """Take a number and a share of the cores, so that as many threads run as there are cores, however many trials."""
    for number in range(jobs):
        held = os.open(folder / f".place{number}", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            continue
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // jobs)
        os.sched_setaffinity(0, [cores[(number * share + offset) % len(cores)] for offset in range(share)])
        os.environ[_PLACE] = str(number)
        return
    raise RuntimeError(f"more workers than {jobs}")


def finish(folder: Path, *, keep: bool, missed: bool) -> None:
    """Remove the folder unless it is wanted, and leave with 1 where a bar was missed."""
    if keep or missed:
        print(f"left in {folder}")
    else:
        shutil.rmtree(folder)
    sys.exit(int(missed))


def why(error: Any) -> str:
    """What a trial that raised came to, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
