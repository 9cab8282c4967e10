"""SIGKILL at every change of the file system, for every command that writes; then the same command again.

    python -m bench.chaos.writes [--count 0] [--seed 0] [--jobs N] [--minutes M] [--only launch,merge,...]

Each command runs in a fork that is killed at its nth change (bench/chaos/changes.py), for every n, or for `--count` of
them drawn from the seed. What is then published, under a name without a dot in front, must be whole: as it was before,
or as the command that was never killed leaves it. Then the command is typed again, as a user would. Its result must be
the same byte for byte, and no name may be anywhere, in run, output, cache or temporary folder, that is not there when
it was never killed. Exit code 1 where a bar is missed.
"""

import functools
import hashlib
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.chaos.changes import forked, obstacle, traced
from bench.chaos.commands import COMMANDS, build, settled
from bench.chaos.ground import Ground, table
from bench.chaos.trials import each, finish, folder_for, parser, place, why
from qdist.core.errors import QdistError

VOLATILE = re.compile(r"/(events|pulse|stacks|logs)/|/(result|machine|versions|plan)\.json$|\.html$|/command\.txt$|"
                      r"/launch\.sh$|\.lock$|\.prom$|/cache/prepared/")  # fmt: skip
"""Names whose contents hold times or durations: that they are there counts, what they hold does not."""
IGNORED = re.compile(r"(^|/)[^/]*\.lock$|^tmp/torch|^tmp/__|/__pycache__/|^cache/known/")
"""Locks stay, so that nobody locks a file that another has removed; others' files are not ours; and what the cache
knows of a file is named for its inode and time, which are not those of the file that a killed command had made."""
NAMED = re.compile(r"^(cache/(?:packed/\.?[^/]*-|prepared/))[0-9a-f]{16,}")
"""Names that are of when a GGUF file was converted; two of them are told from one."""
GROWS = re.compile(r"^runs/[^/]*/(events|pulse|stacks|logs|ended\.json)$")
"""What is written as a run goes, of which readers know that its last line may be torn; how a failed launch ended."""
AT_A_TIME, SHOWN = 6, 3
Listing = dict[str, str]


class Task(NamedTuple):
    """Points of one command; none where they are to be counted. folder: of all trials."""

    folder: Path
    command: str
    points: tuple[int, ...]


class Whole(NamedTuple):
    """A command that was never killed."""

    changes: int
    before: Listing
    after: Listing


class Point(NamedTuple):
    """What came of a kill: sentences, empty where all is well."""

    at: str
    torn: list[str]
    published: list[str]
    differs: list[str]
    left: list[str]

    @property
    def is_well(self) -> bool:
        return not (self.torn or self.published or self.differs or self.left)


def main() -> None:
    """Count each command's changes, kill it at them, and print what came of it."""
    options = parser("bench.chaos.writes", __doc__ or "", count=0, of="Points of each command; 0 for all of them.")
    options.add_argument("--only", default=",".join(COMMANDS), help="Commands.  [default: all]")
    options.add_argument("--points", default="", metavar="FIRST-LAST", help="These alone.  [default: all]")
    given = options.parse_args()
    if reason := obstacle():
        print(f"skipped: {reason}")
        return
    folder, dice = folder_for("writes"), random.Random(given.seed)
    names = given.only.split(",")
    counts, failed = {}, {}
    bounds = {"folder": folder, "jobs": given.jobs, "minutes": given.minutes}
    for task, found in each(count, [Task(folder, name, ()) for name in names], **bounds):
        if isinstance(found, BaseException):
            failed[task.command] = why(found)
            print(f"{task.command}: {why(found)}", flush=True)
        else:
            counts[task.command] = found
            print(f"{task.command}: {found} changes", flush=True)
    rows: dict[str, list[Point]] = {name: [] for name in counts}
    for task, found in each(trial, tasks(folder, counts, given.count, given.points, dice), **bounds):
        if isinstance(found, BaseException):
            failed[task.command] = why(found)
            print(f"{task.command} {task.points}: {why(found)}", flush=True)
            continue
        rows[task.command] += found
        print(f"{task.command}: {len(rows[task.command])} of {counts[task.command]}", flush=True)
        for point in found:
            for what in ("torn", "published", "differs", "left"):
                said = getattr(point, what)
                more = f"; and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
                if said:
                    print(f"  {point.at}: {what}: {'; '.join(said[:SHOWN])}{more}", flush=True)
    print(summary(counts, rows, failed))
    finish(folder, keep=given.keep, missed=bool(failed) or not all(p.is_well for own in rows.values() for p in own))


def tasks(folder: Path, counts: dict[str, int], count: int, only: str, dice: random.Random) -> Iterator[Task]:
    """A few points at a time, of one command after the other."""
    for name, changes in counts.items():
        first, last = map(int, only.split("-")) if only else (1, changes)
        points = list(range(first, min(last, changes) + 1))
        chosen = sorted(dice.sample(points, count)) if 0 < count < len(points) else points
        for start in range(0, len(chosen), AT_A_TIME):
            yield Task(folder, name, tuple(chosen[start : start + AT_A_TIME]))


def count(task: Task) -> int:
    """How many changes a command makes that is never killed."""
    return never_killed(task.folder, task.command).changes


def trial(task: Task) -> list[Point]:
    """A command killed at some of its changes, and typed again."""
    return [killed(task.folder, task.command, point) for point in task.points]


@functools.cache
def world(folder: Path) -> Path:
    """This process's own models, runs and cache, made once: `world` to work in, `snapshot` as it was."""
    at = folder / f"place{place()}"
    own = at / "world"
    (own / "tmp").mkdir(parents=True, exist_ok=True)
    alone = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= Ground(own).environment({"TMPDIR": str(own / "tmp"), **alone})
    tempfile.tempdir = None
    settled()
    if not (at / "snapshot").is_dir():
        if code := forked(functools.partial(build, own), log=at / "build.log"):
            raise RuntimeError(f"building ended with {code}: {(at / 'build.log').read_text()[-800:]}")
        subprocess.run(["cp", "-a", str(own), str(at / "snapshot")], check=True)
    return own


def restore(own: Path) -> None:
    """The world as it was built."""
    shutil.rmtree(own)
    subprocess.run(["cp", "-a", str(own.with_name("snapshot")), str(own)], check=True)


@functools.cache
def never_killed(folder: Path, name: str) -> Whole:
    """Run a command to its end, and list what is there before and after. Raises RuntimeError where it fails."""
    own = world(folder)
    log = own.with_name(f"{name}.log")
    restore(own)
    command, before = COMMANDS[name], listing(own)
    ended = traced(functools.partial(command.run, own), under=own, log=log)
    if ended.code:
        raise RuntimeError(f"never killed, and ended with {ended.code}: {log.read_text()[-800:]}")
    return Whole(ended.changes, before, listing(own))


def killed(folder: Path, name: str, point: int) -> Point:
    """A command killed at its nth change, looked at, and typed again until it is done."""
    whole, own, command = never_killed(folder, name), world(folder), COMMANDS[name]
    log = own.with_name(f"{name}.log")
    restore(own)
    log.write_text("")
    ended = traced(functools.partial(command.run, own), under=own, log=log, kill_at=point)
    at = f"{name} {point}/{whole.changes} {ended.last or f'ended with {ended.code}'}"
    torn, published = look(own, listing(own), whole)
    log.write_text("")
    code = forked(functools.partial(command.again or command.run, own), log=log)
    return Point(at, torn, published, *compared(own, whole, code, log.read_text(errors="replace")))


def compared(own: Path, whole: Whole, code: int, said: str) -> tuple[list[str], list[str]]:
    """In what the world differs from that of a command that was not harmed, and what is left in it beside.

    code, said: of the command when it was typed again.
    """
    after, differs, end = listing(own), [], " ".join(said.split())[-300:]
    if code and not told(said):
        differs.append(f"typed again it ended with {code}: {end}")
    if "Traceback (most recent call last)" in said:
        differs.append(f"typed again it showed a traceback: {end}")
    differs += [f"{path} is another" for path in whole.after if path in after and after[path] != whole.after[path]]
    differs += [f"{path} is missing" for path in whole.after if path not in after]
    return differs, [path for path in after if path not in whole.after]


def told(said: str) -> bool:
    """Whether a command was refused because the one that was killed had done all."""
    return bool(re.search(r"error: \S+ exists|holds a finished run", said))


def listing(own: Path) -> Listing:
    """SHA-256 of every file, empty for folders and for contents that differ from run to run."""
    found = {}
    for path in sorted(own.rglob("*")):
        name = NAMED.sub(r"\1HASH", str(path.relative_to(own)))
        while name in found:
            name += " again"
        if IGNORED.search(name) or path.is_dir():
            if path.is_dir() and not any(path.iterdir()):
                found[name + "/"] = ""
            continue
        found[name] = "" if VOLATILE.search(f"/{name}") else hashlib.sha256(content(path)).hexdigest()
    return found


def content(path: Path) -> bytes:
    """Of a file; of a manifest without what says when a GGUF file was converted."""
    raw = path.read_bytes()
    return re.sub(rb'"source_identity": *"[0-9a-f]+"', b"", raw) if path.name == "qdist.json" else raw


def look(own: Path, now: Listing, whole: Whole) -> tuple[list[str], list[str]]:
    """What is torn of the things that are published, and hidden names inside of them."""
    torn, published = [], []
    before, after, there = (by_root(each) for each in (whole.before, whole.after, now))
    for root, files in there.items():
        if any(part.startswith(".") for part in root.split("/")) or not root or GROWS.search(root):
            continue
        wanted = after.get(root, {})
        known = {**wanted, **before.get(root, {})}
        hidden = [name for name in files if name not in known and "/." in f"/{name}"]
        published += hidden
        visible = {name: content for name, content in files.items() if name not in hidden}
        if visible not in (before.get(root, {}), wanted):
            others = sorted(name for name in {*visible, *wanted} if visible.get(name) != wanted.get(name))
            names = {name.rpartition("/")[2] for name in others}
            if "/checkpoints/" in root and is_no_step(own / root, names if root in after else set()):
                continue
            torn.append(f"{root}: {', '.join(others[:4])}")
    torn += [f"{root} is gone" for root in before if root in after and root not in there and not root.startswith(".")]
    return torn, published


def by_root(found: Listing) -> dict[str, Listing]:
    """Files by what they are published with: an output folder, an adapter, a checkpoint, a file of the cache."""
    roots: dict[str, Listing] = {}
    for name, content in found.items():
        parts = name.rstrip("/").split("/")
        depth = {"runs": 4 if parts[2:3] == ["checkpoints"] else 3, "cache": 3}.get(parts[0], 1)
        if parts[0] in ("runs", "cache") and len(parts) < depth:
            continue  # a folder on the way
        roots.setdefault("/".join(parts[:depth]), {})[name] = content
    return roots


def is_no_step(folder: Path, others: set[str]) -> bool:
    """Whether a step's folder is one that readers do not accept yet, or wholly one from before its evaluation.

    others: files that are not as they are at the end.
    """
    from qdist.runtime.train.checkpoint import load

    if not (folder / "DONE").is_file():
        return True
    if not others <= {"held_out.json"}:
        return False
    try:
        load(folder)
    except QdistError:
        return False
    return True


def summary(counts: dict[str, int], rows: dict[str, list[Point]], failed: dict[str, str]) -> str:
    """A line a command, and all."""
    head = ("", "changes", "killed at", "torn", "litter published", "differ", "left after the next command")

    def line(name: str, changes: object, own: list[Point]) -> tuple[object, ...]:
        lists = ([point.torn, point.published, point.differs, point.left] for point in own)
        return (name, changes, len(own), *([sum(map(bool, column)) for column in zip(*lists, strict=True)] or [0] * 4))

    lines = [line(name, counts[name], own) for name, own in rows.items()]
    lines.append(line("all", sum(counts.values()), [point for own in rows.values() for point in own]))
    broken = "".join(f"\n{name}: {error}" for name, error in failed.items())
    return f"\n{table(head, lines)}{broken}"


if __name__ == "__main__":
    main()
