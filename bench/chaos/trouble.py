"""What may happen to a run on two CPU ranks: how soon is it named, what does launch say, and does what it says help?

    python -m bench.chaos.trouble [--count 9] [--seed 0] [--jobs N] [--minutes M] [--only stopped,killed,...]

A rank is stopped (SIGSTOP), or killed, or raises, or its data hang, or the kernel ends it for lack of memory (a memory
cgroup of its own), or a learning rate that no adapter survives turns the loss into NaN; data come from a pipe that
nobody writes to; MASTER_PORT is taken; /dev/shm holds 64 KiB. `qdist monitor RUN --once` is asked once a second, as a
user would. Then what the error says after `try:` is done; where that is a new run with another setting, resuming is
tried as well. Exit code 1 where a fault was not named within 30 s, or launch did not end with its exit code, or what
was tried did not go to its end, or a process was left. What needs root or cgroups is skipped with the reason.
"""

import functools
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.chaos.ground import ROOT, Ground, left, processes, qdist, table
from bench.chaos.trials import each, finish, folder_for, parser, why
from qdist.core.telemetry.events import decode_lines
from qdist.host.run.rundir import RunDir
from qdist.host.run.watchdog import read_pulses

NAMED_WITHIN_S, LONGEST_S, STUCK_S, VICTIM, STRIKES_AT = 30, 90, 20, 1, 60
SETTINGS = {"steps": "200", "train.save_steps": "5", "train.held_out": "0.1", "train.stuck_seconds": str(STUCK_S)}
SURVIVES_NOTHING = (("optim.lr", "1e30"), ("optim.clip", "0"), ("train.save_steps", "1"))
SITECUSTOMIZE = """\
import os, pathlib, time
if os.environ.get("RANK") == "{rank}":
    from qdist.runtime.data.batches import Samples
    whole = Samples.step
    def step(self, number):
        if number == {step} and not pathlib.Path({note!r}).exists():
            pathlib.Path({note!r}).write_text(str(time.time()))
            {does}
        return whole(self, number)
    Samples.step = step
"""
"""Python imports a module of this name at its start; the ranks find it because of PYTHONPATH."""
RAISES = 'raise ValueError("made by bench/chaos/trouble.py")'
HANGS = "time.sleep(3600)"
EATS = "eaten = [bytearray(os.urandom(1 << 20) * 64) for _ in range(400)]"
ROOM = 3 << 30
"""Bytes that a launch with two ranks has in its cgroup: more than it needs."""


class Task(NamedTuple):
    """A fault by its name, and a folder of its own."""

    folder: Path
    fault: str
    number: int


class Outcome(NamedTuple):
    """What came of a fault. Seconds count from it; None for what never came.

    shown: what the monitor had to say, by when it said so first. said: the launcher's error.
    stacks: ranks that wrote theirs.
    """

    named_s: float | None
    ended_s: float | None
    shown: dict[str, float]
    exit_code: int | None
    said: str
    stacks: list[int]


class Row(NamedTuple):
    """An outcome; what was tried then, with exit codes; processes that were left."""

    outcome: Outcome
    tried: list[tuple[str, int]]
    left: int

    def misses(self, fault: "Fault") -> list[str]:
        """Bars that it does not reach."""
        named = self.outcome.named_s is not None and self.outcome.named_s <= NAMED_WITHIN_S
        return [
            *(["not named in time"] if fault.named and not named else []),
            *([f"exit code {self.outcome.exit_code}"] if self.outcome.exit_code != fault.code else []),
            *(["a traceback"] if "Traceback (most recent call last)" in self.outcome.said else []),
            *([f"{self.tried[-1][0]} failed"] if self.tried and self.tried[-1][1] else []),
            *([f"{self.left} processes left"] if self.left else []),
        ]


def main() -> None:
    """Each fault in a run of its own, then what its error says to try."""
    options = parser("bench.chaos.trouble", __doc__ or "", count=len(FAULTS), of="Runs, one fault after the other.")
    options.add_argument("--only", default=",".join(FAULTS), help="Faults.  [default: all]")
    given = options.parse_args()
    folder, lines, missed = folder_for("trouble"), [], False
    names = itertools.islice(itertools.cycle(given.only.split(",")), given.count)
    tasks = [Task(folder / f"{number:03}", name, number) for number, name in enumerate(names)]
    for task, found in each(trial, tasks, folder=folder, jobs=given.jobs, minutes=given.minutes):
        if isinstance(found, str | BaseException):
            said = found if isinstance(found, str) else why(found)
            missed |= not isinstance(found, str)
            lines.append((task.fault, said if isinstance(found, str) else f"BROKEN: {said}", "", "", "", "", ""))
            print(f"{task.fault}: {said}", flush=True)
            continue
        misses, outcome = found.misses(FAULTS[task.fault]), found.outcome
        missed |= bool(misses)
        for words, when_s in outcome.shown.items():
            print(f"{task.fault}: the monitor after {when_s:.1f} s: {words}")
        print(f"{task.fault}: launch, exit code {outcome.exit_code}: {outcome.said}", flush=True)
        stacks = ",".join(map(str, outcome.stacks)) or "-"
        done = "; ".join(f"{what}: {code}" for what, code in found.tried)
        lines.append((task.fault, ", ".join(misses) or "well", seconds(outcome.named_s), seconds(outcome.ended_s),
                      outcome.exit_code, stacks, done))  # fmt: skip
    head = ("fault", "", "named after", "ended after", "exit", "stacks of", "tried, with exit code")
    print(f"\n{table(head, sorted(lines, key=lambda line: list(FAULTS).index(line[0])))}")
    finish(folder, keep=given.keep, missed=missed)


def trial(task: Task) -> Row | str:
    """Suffer a fault and try what is said; or why it cannot be had here."""
    fault, ground = FAULTS[task.fault], Ground(task.folder)
    ground.model.exists()
    with ExitStack() as stack:
        wrapped = stack.enter_context(fault.wrap(ground)) if fault.wrap else []
        if isinstance(wrapped, str):
            return f"skipped: {wrapped}"
        outcome = suffer(fault, ground, wrapped)
        within = left(str(ground.folder), 5)
    tried = try_what_is_said(ground, outcome) if fault.named and fault.resumes else []
    for pid in within:
        os.kill(pid, signal.SIGKILL)
    return Row(outcome, tried, len(within))


def suffer(fault: "Fault", ground: Ground, wrapped: list[str]) -> Outcome:
    """Start a run, do it harm, and ask the monitor until it has named the fault and the run has ended."""
    run, output = RunDir(ground.folder / "run"), ground.folder / "said"
    environment = ground.environment(fault.environment(ground.folder))
    with open(output, "wb") as out:
        line = [*wrapped, *command(ground, run.path, dict(fault.settings), fault.data)]
        launcher = subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT, env=environment)
    while (began := fault.strike(run)) is None:
        if launcher.poll() is not None:
            raise RuntimeError(f"the run ended before the fault: {output.read_text()[-1000:]}")
        time.sleep(0.02)
    shown: dict[str, float] = {}
    named_s = ended_s = None
    while ((fault.named and named_s is None) or ended_s is None) and time.time() - began < LONGEST_S:
        words = asked(ground, run) if fault.named else ""
        # What is counted in it changes from second to second: 'silent for 12 s'.
        if words and re.sub(r"\d+ s\b", "", words) not in {re.sub(r"\d+ s\b", "", old) for old in shown}:
            shown[words] = time.time() - began
        if ended_s is None and launcher.poll() is not None:
            ended_s = time.time() - began
        said = output.read_text(errors="replace") if ended_s is not None else ""
        if named_s is None and fault.named and re.search(fault.named, f"{words} {said}"):
            named_s = time.time() - began
        if ended_s is not None and named_s is None and not run.exists():
            break
    if launcher.poll() is None:
        launcher.kill()  # its ranks end with it
    launcher.wait()
    stacks = [rank for rank in (0, 1) if (path := run.stack_file(rank)).is_file() and path.stat().st_size]
    text = output.read_text(errors="replace")
    error = re.search(r"^(error: |Traceback ).*", text, re.MULTILINE | re.DOTALL)
    return Outcome(named_s, ended_s, shown, launcher.returncode, error[0].strip() if error else "no error", stacks)


def asked(ground: Ground, run: RunDir) -> str:
    """What the monitor has to say below the curves, a second later: how the run ended, and warnings."""
    began = time.monotonic()
    done = subprocess.run(
        qdist("monitor", str(run.path), "--once"),
        capture_output=True,
        text=True,
        env=ground.environment({"LINES": "50"}),
    )
    time.sleep(max(0.0, 1.0 - (time.monotonic() - began)))
    found = re.search(r"^(! |(failed|killed|stopped): ).*", done.stdout, re.MULTILINE | re.DOTALL)
    return " ".join(found[0].split()) if found else ""


def try_what_is_said(ground: Ground, outcome: Outcome) -> list[tuple[str, int]]:
    """What was run, and its exit code; what the error advises is the last."""
    resume = qdist("launch", "--resume", "--run", str(ground.folder / "run"))
    tried = [("resume", ended(ground, resume))]
    if "optim.lr in a new run" in outcome.said:
        tried.append(("resume with a smaller optim.lr", ended(ground, [*resume, "--set", "optim.lr=1e-2"])))
        tried.append(("new run with it", ended(ground, command(ground, ground.folder / "again", {}, ""))))
    return tried


def ended(ground: Ground, line: list[str]) -> int:
    """The exit code of a command; what it says at its end is printed where it fails."""
    done = subprocess.run(line, capture_output=True, text=True, env=ground.environment(), timeout=2 * LONGEST_S)
    if done.returncode:
        print(f"{' '.join(line[2:])}\n  {done.returncode}: {done.stderr.strip()}", flush=True)
    return done.returncode


def command(ground: Ground, run: Path, settings: dict[str, str], data: str) -> list[str]:
    """The command of a run over random weights, or over data of a fault's own."""
    flags = ("--data", str(ground.folder / data)) if data else ("--load-format", "dummy")
    return ground.launch(run, "--gpus", "2", *flags, settings={**SETTINGS, **settings})


def signalled(number: int) -> Callable[[RunDir], float | None]:
    """Sends a signal to a rank that has trained for a while."""

    def strike(run: RunDir) -> float | None:
        if not run.checkpoint_steps() or run.checkpoint_steps()[-1] < 20:
            return None
        pulse = read_pulses(run)[VICTIM]
        if pulse.pid not in processes(str(run.path)):
            raise RuntimeError(f"process {pulse.pid} is not of {run.path}")
        os.kill(pulse.pid, number)
        return time.time()

    return strike


def noted(run: RunDir) -> float | None:
    """When the rank did its harm, by its own note."""
    note = run.path.parent / "struck-at"
    return float(note.read_text()) if note.is_file() and note.read_text() else None


def not_finite(run: RunDir) -> float | None:
    """When rank 0 wrote down the first step with gradients or a loss that are no numbers."""
    path = run.event_file(0)
    events = decode_lines(path.read_bytes()) if path.exists() else []
    return next((event.time for event in events if event.skipped), None)


def at_once(run: RunDir) -> float | None:
    """From the start."""
    return time.time()


def doing(what: str, folder: Path) -> dict[str, str]:
    """An environment in which one rank does something in the middle of its training, once."""
    (folder / "path").mkdir(exist_ok=True)
    text = SITECUSTOMIZE.format(rank=VICTIM, step=STRIKES_AT, note=str(folder / "struck-at"), does=what)
    (folder / "path" / "sitecustomize.py").write_text(text)
    path = (str(folder / "path"), str(ROOT), os.environ.get("PYTHONPATH"))
    return {"PYTHONPATH": os.pathsep.join(filter(None, path))}


@contextmanager
def in_cgroup(ground: Ground) -> Iterator[list[str] | str]:
    """What a command is begun with so that it has little memory, or why that cannot be."""
    root = Path("/sys/fs/cgroup")
    parent, limit = (root / "memory", "memory.limit_in_bytes") if (root / "memory").is_dir() else (root, "memory.max")
    try:
        own = parent / f"qdist-chaos-{os.getpid()}-{random.randrange(10**6)}"
        own.mkdir()
    except OSError as error:
        yield f"no memory cgroup can be made: {error.strerror}"
        return
    try:
        if not (own / limit).is_file():
            yield f"{own} has no {limit}"
            return
        (own / limit).write_text(str(ROOM))
        if (own / "memory.swap.max").is_file():
            (own / "memory.swap.max").write_text("0")
        yield ["sh", "-c", f'echo $$ > {own}/cgroup.procs && exec "$@"', "sh"]
        left(str(ground.folder), 10)
    finally:
        own.rmdir()


@contextmanager
def with_small_shm(_: Ground) -> Iterator[list[str] | str]:
    """The same for a /dev/shm of 64 KiB, in a mount namespace of its own."""
    line = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]
    can = shutil.which("unshare") and subprocess.run([*line, "true"], capture_output=True).returncode == 0
    yield line if can else "a mount namespace needs root"


@contextmanager
def with_taken_port(_: Ground) -> Iterator[list[str] | str]:
    """The same where somebody listens where MASTER_PORT says."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield ["env", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={taken.getsockname()[1]}"]


@contextmanager
def with_silent_pipe(ground: Ground) -> Iterator[list[str] | str]:
    """The same for data from a pipe that nobody writes to."""
    os.mkfifo(ground.folder / "pipe.jsonl")
    yield []


def seconds(value: float | None) -> str:
    """For the table."""
    return "" if value is None else f"{value:.1f} s"


class Fault(NamedTuple):
    """What is done to a run.

    strike: does it, or sees whether it has come; when, in seconds since the epoch, or None for not yet.
    named: a pattern of the monitor's or launch's words; empty for what a run survives.
    code: that launch ends with. data: a name in the ground's folder; random tokens by default.
    resumes: it can go on afterwards.
    """

    strike: Callable[[RunDir], float | None]
    named: str
    settings: tuple[tuple[str, str], ...] = ()
    environment: Callable[[Path], dict[str, str]] = lambda _: {}
    wrap: Callable[[Ground], AbstractContextManager[list[str] | str]] | None = None
    code: int = 1
    data: str = ""
    resumes: bool = True


FAULTS = {
    "stopped": Fault(signalled(signal.SIGSTOP), rf"rank {VICTIM} has been silent .* process is stopped"),
    "killed": Fault(signalled(signal.SIGKILL), rf"rank {VICTIM} (was killed by SIGKILL|.* process is gone)"),
    "raised": Fault(noted, rf"rank {VICTIM} .*ValueError: made by", environment=functools.partial(doing, RAISES)),
    "hanging": Fault(noted, rf"rank {VICTIM} has not moved", environment=functools.partial(doing, HANGS)),
    "nan": Fault(not_finite, r"the loss is (nan|inf|NaN or infinite)|gradients are NaN or infinite", SURVIVES_NOTHING),
    "memory": Fault(noted, rf"rank {VICTIM} was killed by SIGKILL, which is what Linux does .* memory runs out",
                    environment=functools.partial(doing, EATS), wrap=in_cgroup),
    "pipe": Fault(at_once, r"error: .*pipe\.jsonl", wrap=with_silent_pipe, data="pipe.jsonl", code=2, resumes=False),
    "port": Fault(at_once, "", wrap=with_taken_port, code=0),
    "shm": Fault(at_once, "", wrap=with_small_shm, code=0),
}  # fmt: skip


if __name__ == "__main__":
    main()
