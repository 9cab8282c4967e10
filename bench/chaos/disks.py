"""Full, read-only and slow disks under every command that writes: is it said, is nothing torn, does it go on with room?

    python -m bench.chaos.disks [--count 60] [--seed 0] [--jobs N] [--minutes M] [--only launch,merge,...]

Models, runs, cache, temporary folder and output lie on a tmpfs of this process's own mount namespace, which needs root.
Full: what is free is drawn, from nothing to what the command needs. Filled: there is room at first, and from a drawn
moment on none. Read-only: from the start. Slow: each fsync takes a while.

The command must end with a sentence and exit code 1 or 2 (or 0, where it fitted), nothing that is published may be
torn, and the same command, or --resume, given again with room must end as if nothing had been, with nothing left.
"""

import ctypes
import functools
import itertools
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from bench.chaos.changes import begun, forked
from bench.chaos.commands import COMMANDS
from bench.chaos.ground import table
from bench.chaos.trials import each, finish, folder_for, parser, why
from bench.chaos.writes import Whole, compared, listing, look, world

KINDS = ("full", "filled", "read-only", "slow")
ENOUGH, PAGE = 1 << 30, 4096
SLOW_S = 0.05
SENTENCE = re.compile(r"^error: ", re.MULTILINE)


class Task(NamedTuple):
    """A command on a kind of disk. share: of what it needs, what is free or may be taken before the disk is full."""

    folder: Path
    command: str
    kind: str
    share: float


class Row(NamedTuple):
    """What came of it: sentences, empty where all is well. code: of the first time."""

    code: int
    unsaid: list[str]
    torn: list[str]
    differs: list[str]
    left: list[str]

    @property
    def is_well(self) -> bool:
        return not (self.unsaid or self.torn or self.differs or self.left)


class Needs(NamedTuple):
    """A command on a disk with room: what is there before and after, and bytes used."""

    whole: Whole
    before: int
    after: int


def main() -> None:
    """Draw commands and disks, and print what came of them."""
    options = parser("bench.chaos.disks", __doc__ or "", count=60, of="Trials, over commands and kinds in turn.")
    options.add_argument("--only", default=",".join(COMMANDS), help="Commands.  [default: all]")
    options.add_argument("--kinds", default=",".join(KINDS))
    given = options.parse_args()
    if os.geteuid() or shutil.which("mount") is None:
        print("skipped: a disk of one's own needs root and mount(8)")
        return
    folder, dice = folder_for("disks"), random.Random(given.seed)
    pairs = itertools.cycle([(name, kind) for kind in given.kinds.split(",") for name in given.only.split(",")])
    tasks = [Task(folder, name, kind, dice.random()) for name, kind in itertools.islice(pairs, given.count)]
    rows: list[tuple[Task, Row]] = []
    for task, found in each(trial, tasks, folder=folder, jobs=given.jobs, minutes=given.minutes):
        row = Row(-1, [why(found)], [], [], []) if isinstance(found, BaseException) else found
        rows.append((task, row))
        said = "; ".join((*row.unsaid, *row.torn, *row.differs, *row.left)) or "well"
        print(f"{task.command}, {task.kind} {task.share:.2f}: exit code {row.code}: {said}", flush=True)
    print(summary(rows))
    finish(folder, keep=given.keep, missed=not rows or not all(row.is_well for _, row in rows))


def trial(task: Task) -> Row:
    """A command on a disk that does it harm, then again on one with room."""
    own, needs, command = world(task.folder), needed(task.folder, task.command), COMMANDS[task.command]
    log = own.with_name(f"{task.command}.log")
    log.write_text("")
    fresh_disk(own)
    run = functools.partial(command.run, own)
    if task.kind == "full":
        free = int(task.share * (needs.after - needs.before)) // PAGE * PAGE
        remount(own, f"size={used(own) + free}")
    elif task.kind == "read-only":
        remount(own, "ro")
    if task.kind == "filled":
        code = filled(run, own, log, used(own) + int(task.share * (needs.after - needs.before)))
    else:
        code = forked(functools.partial(slowly, run) if task.kind == "slow" else run, log=log)
    said = log.read_text(errors="replace")
    remount(own, f"rw,size={ENOUGH}")
    torn, published = look(own, listing(own), needs.whole)
    log.write_text("")
    second = forked(functools.partial(command.again or command.run, own), log=log) if code else 0
    differs, left = compared(own, needs.whole, second, log.read_text(errors="replace"))
    return Row(code, unsaid(code, said, task.kind), torn + published, differs, left)


def unsaid(code: int, said: str, kind: str) -> list[str]:
    """What is wrong with what a user was told."""
    end = " ".join(said.split())[-400:]
    if "Traceback (most recent call last)" in said:
        return [f"a traceback: {end}"]
    if code and kind == "slow":
        return [f"it did not go through: {end}"]
    if code not in (0, 1, 2) or (code and not SENTENCE.search(said)):
        return [f"exit code {code} without a sentence: {end}"]
    return []


def filled(run: Callable[[], int], own: Path, log: Path, most: int) -> int:
    """Run in a fork, and leave no room from the moment on at which so many bytes are taken; its exit code."""
    child = begun(run, log=log)
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and used(own) < most:
        time.sleep(0.001)
    if ended[0]:
        return os.waitstatus_to_exitcode(ended[1])
    line = ["mount", "-o", "remount,size={}", str(own)]
    while subprocess.run([word.format(used(own)) for word in line], capture_output=True).returncode:
        if (ended := os.waitpid(child, os.WNOHANG))[0]:  # it had taken more by then, each time
            return os.waitstatus_to_exitcode(ended[1])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def slowly(run: Callable[[], int]) -> int:
    """With a disk that takes its time to flush."""
    fsync = os.fsync

    def slow(descriptor: Any) -> None:
        time.sleep(SLOW_S)
        fsync(descriptor)

    with mock.patch("os.fsync", slow):
        return run()


@functools.cache
def needed(folder: Path, name: str) -> Needs:
    """Run a command to its end on a disk with room. Raises RuntimeError where it fails."""
    own = world(folder)
    alone(own)
    fresh_disk(own)
    log, before, bytes_before = own.with_name(f"{name}.log"), listing(own), used(own)
    log.write_text("")
    code = forked(functools.partial(COMMANDS[name].run, own), log=log)
    if code:
        raise RuntimeError(f"with room it ended with {code}: {log.read_text()[-800:]}")
    return Needs(Whole(0, before, listing(own)), bytes_before, used(own))


@functools.cache
def alone(own: Path) -> None:
    """From now on, what this process mounts is seen by itself and its children alone."""
    clone_newns = 0x00020000
    if ctypes.CDLL(None, use_errno=True).unshare(clone_newns):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ENOUGH}", "tmpfs", str(own)], check=True)


def fresh_disk(own: Path) -> None:
    """The world as it was built, on its tmpfs."""
    subprocess.run(["umount", str(own)], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ENOUGH}", "tmpfs", str(own)], check=True)
    subprocess.run(["cp", "-a", f"{own.with_name('snapshot')}/.", str(own)], check=True)


def remount(own: Path, how: str) -> None:
    """Change size or rights of the disk."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(own)], check=True)


def used(own: Path) -> int:
    """Bytes that are taken of the disk."""
    return shutil.disk_usage(own).used


def summary(rows: list[tuple[Task, Row]]) -> str:
    """A line for each command and each kind."""
    head = ("", "trials", "fitted", "refused", "no sentence", "torn or litter published", "differ", "left")

    def line(name: str, own: list[Row]) -> tuple[object, ...]:
        fitted = sum(row.code == 0 for row in own)
        lists = ([row.unsaid, row.torn, row.differs, row.left] for row in own)
        counts = [sum(map(bool, column)) for column in zip(*lists, strict=True)] or [0] * 4
        return (name, len(own), fitted, len(own) - fitted, *counts)

    kinds = [line(kind, [row for task, row in rows if task.kind == kind]) for kind in KINDS]
    lines = [line(name, [row for task, row in rows if task.command == name]) for name in COMMANDS]
    return f"\n{table(head, [*(own for own in lines if own[1]), *kinds, line('all', [row for _, row in rows])])}"


if __name__ == "__main__":
    main()
