"""Spoils every kind of file and setting that a reader of qdist gets from others, and looks for what is no sentence.

    python -m bench.chaos.readers --count 50000 --seed 0 --jobs 2

A reader may give a right answer or raise a QdistError. Anything else is a finding: another exception, a native crash,
more than 10 s. Findings are told once for each place that they come from, with the number of a mutation that leads
there (`--only NUMBER` runs that one again). Exit code 1 where there is any. About 5 ms a mutation.
"""

import argparse
import contextlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from bench.chaos.ground import table
from bench.chaos.mutations import NODES, Form, put_node, spoiled
from bench.chaos.strangers import READERS, Reader, make_world
from qdist.core.errors import QdistError
from qdist.core.text import printable
from qdist.host.terminal import error_text

_MOST_S = 10.0
_LONGEST = 60_000
"""Of a line; JSON on one line may hold a long value."""
_NODE_SHARE = 0.05
"""Of mutations that put something else than a file in its place."""


class Finding(NamedTuple):
    """What a reader did beside reading or refusing."""

    reader: str
    kind: str
    """The exception's class, a signal, or 'hang'."""
    where: str
    """The innermost line of qdist."""
    said: str


class _TooLong(BaseException):
    """Raised by the alarm."""


def run_one(number: int, seed: int, world: Path, readers: Sequence[Reader] = READERS) -> Finding | None:
    """One mutation of one file; the file is as before afterwards."""
    random = Random(f"{seed} {number}")
    reader = random.choices(readers, [reader.weight for reader in readers])[0]
    path = world / reader.file
    content = path.read_bytes()
    with _in_place(path, content, reader.form, random):
        return _finding(reader, world)


@contextlib.contextmanager
def _in_place(path: Path, content: bytes, form: Form, random: Random) -> Iterator[None]:
    if random.random() < _NODE_SHARE and form != "inline":
        path.unlink()
        put_node(path, random.choice(NODES))
    else:
        path.write_bytes(spoiled(content, form, random)[1])
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(content)


def _finding(reader: Reader, world: Path) -> Finding | None:
    signal.setitimer(signal.ITIMER_REAL, _MOST_S)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            reader.read(world)
    except QdistError as error:
        return _unclear(reader, error_text(error), _place(error))
    except SystemExit:
        pass
    except _TooLong as error:
        return Finding(reader.name, "hang", _place(error), "")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Finding(reader.name, type(error).__name__, _place(error), str(error).partition("\n")[0][:60])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return _unclear(reader, said.getvalue(), "")


def _unclear(reader: Reader, shown: str, place: str) -> Finding | None:
    """What a user could not read: the words of a traceback, very many, or what controls a terminal."""
    if "Traceback" in shown or max(map(len, shown.split("\n"))) > _LONGEST:
        return Finding(reader.name, "long text", place, shown[:60])
    if printable(shown) != shown:
        return Finding(reader.name, "control characters", place, ascii(shown)[:60])
    return None


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/qdist/" in frame.filename] or list(frames)
    return f"{ours[-1].filename.rpartition('/qdist/')[2]}:{ours[-1].lineno}" if ours else ""


def _work(numbers: Sequence[int], seed: int, world: Path, to: Any) -> None:
    """In a process of its own: each number before it is run, and what came of it."""
    signal.signal(signal.SIGALRM, _ring)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for number in numbers:
        to.send((number, None))
        if found := run_one(number, seed, world):
            to.send((number, found))
    to.send((None, None))


def _ring(*_: object) -> None:
    raise _TooLong


def _job(numbers: list[int], seed: int, world: Path) -> Iterator[tuple[int, Finding]]:
    """The findings of many mutations; a worker that dies is replaced by one that goes on behind the last."""
    context, at = get_context("fork"), 0
    while at < len(numbers):
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(numbers[at:], seed, world, theirs))
        worker.start()
        theirs.close()
        last = numbers[at]
        while True:
            try:
                if not ours.poll(3 * _MOST_S):
                    worker.kill()
                    worker.join()
                    yield last, Finding("?", "hang in native code", "", "")
                    break
                number, found = ours.recv()
            except EOFError:
                worker.join()
                yield last, Finding("?", f"died: {worker.exitcode}", "", "")
                break
            if number is None:
                worker.join()
                return
            last = number
            if found:
                yield number, found
        at = numbers.index(last) + 1
        shutil.rmtree(world)
        shutil.copytree(world.with_name("base"), world, symlinks=True)


def _share(job: int, given: argparse.Namespace, folder: Path, to: Any) -> None:
    """A part of the mutations, in a world of its own."""
    world = make_world(folder / str(job) / "world")
    shutil.copytree(world, world.with_name("base"), symlinks=True)
    for number, found in _job(list(range(job, given.count, given.jobs)), given.seed, world):
        to.put((number, found))
    to.put(None)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", type=int, help="The number of a mutation, to see its traceback.")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if given.only is not None:
            make_world(folder / "world")
            signal.signal(signal.SIGALRM, _ring)
            _again(given.only, given.seed, folder / "world")
            return
        context = get_context("fork")
        found: Any = context.Queue()
        jobs = [context.Process(target=_share, args=(job, given, folder, found)) for job in range(given.jobs)]
        for job in jobs:
            job.start()
        findings, first = Counter[Finding](), dict[Finding, int]()
        done = 0
        while done < len(jobs):
            got = found.get()
            if got is None:
                done += 1
                continue
            number, finding = got
            key = finding._replace(said="")
            findings[key] += 1
            first.setdefault(key, number)
            if findings[key] == 1:
                print(number, *finding, file=sys.stderr, flush=True)
        for job in jobs:
            job.join()
    rows = [(*key[:3], count, first[key]) for key, count in findings.most_common()]
    if rows:
        print(table(("reader", "what", "where", "times", "mutation"), rows))
    took = time.monotonic() - began
    print(f"{given.count:,} mutations over {len(READERS)} readers: {len(rows)} kinds of finding, {took:.0f} s")
    sys.exit(bool(rows))


def _again(number: int, seed: int, world: Path) -> None:
    """One mutation, with its traceback."""
    random = Random(f"{seed} {number}")
    reader = random.choices(READERS, [reader.weight for reader in READERS])[0]
    path = world / reader.file
    content = path.read_bytes()
    with _in_place(path, content, reader.form, random):
        print(reader.name, path.read_bytes()[:300] if path.is_file() else f"a {path}")
        signal.setitimer(signal.ITIMER_REAL, _MOST_S)
        reader.read(world)


if __name__ == "__main__":
    main()
