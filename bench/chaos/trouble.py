"""Four faults on two CPU ranks: how soon does qdist monitor name them, what does launch say, does what it says help?

    python bench/faults.py [--only stopped,killed,raised,nan] [--keep]

A tiny random Llama. A rank is stopped (SIGSTOP), or killed (SIGKILL), or raises a Python exception, or a learning rate
that no adapter survives turns the loss into NaN. `qdist monitor RUN --once` is asked once a second, as a user would.
Then what the error says after `try:` is done; where that is a new run with another setting, resuming is tried as well.
Exit code 1 where a fault was not named within 30 s, or where what was tried did not go to its end.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kill import CONFIG, processes, wait_for_none

from qdist.core.events import decode_lines
from qdist.host.pulses import read_pulses
from qdist.host.rundir import RunDir

NAMED_WITHIN_S, LONGEST_S, STUCK_S, VICTIM, RAISES_AT = 30, 90, 20, 1, 60
SETTINGS = {"steps": "200", "global_batch": "4", "micro_batch": "1", "seq_len": "32", "optim.lr": "1e-2", "lora.r": "4",
            "train.save_steps": "5", "train.held_out": "0.1", "train.stuck_seconds": str(STUCK_S)}  # fmt: skip
SURVIVES_NOTHING = (("optim.lr", "1e30"), ("optim.clip", "0"), ("train.save_steps", "1"))
SITECUSTOMIZE = """\
import os, pathlib, time
if os.environ.get("RANK") == "{rank}":
    from qdist.runtime.samples import Samples
    whole = Samples.step
    def step(self, number):
        if number == {step}:
            pathlib.Path({note!r}).write_text(str(time.time()))
            raise ValueError("made by bench/faults.py")
        return whole(self, number)
    Samples.step = step
"""
"""Python imports a module of this name at its start; the ranks find it because of PYTHONPATH."""
QDIST = [sys.executable, "-m", "qdist"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "LINES": "50"}


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


def main() -> None:
    """Each fault in a run of its own, then what its error says to try."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(FAULTS))
    parser.add_argument("--keep", action="store_true", help="Leave the runs where they are.")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="qdist-faults-"))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    rows = []
    for name in arguments.only.split(","):
        print(f"== {name}: {folder / name}", flush=True)
        outcome = suffer(name, folder)
        for words, when_s in outcome.shown.items():
            print(f"monitor, {when_s:.1f} s: {words}")
        print(f"launch, exit code {outcome.exit_code}: {outcome.said}")
        tried = try_what_is_said(name, folder, outcome)
        print(f"left behind: {wait_for_none(folder, 10)} processes", flush=True)
        rows.append((name, outcome, tried))
    print(f"\n{'fault':8} {'named':>7} {'ended':>7} exit  stacks  tried, with exit code")
    for name, outcome, tried in rows:
        stacks = ",".join(map(str, outcome.stacks)) or "-"
        done = "; ".join(f"{what}: {code}" for what, code in tried)
        shown = f"{seconds(outcome.named_s):>7} {seconds(outcome.ended_s):>7} {outcome.exit_code!s:>4}"
        print(f"{name:8} {shown}  {stacks:7} {done}")
    if not arguments.keep:
        shutil.rmtree(folder)
    late = any(outcome.named_s is None or outcome.named_s > NAMED_WITHIN_S for _, outcome, _ in rows)
    raise SystemExit(late or any(tried[-1][1] for *_, tried in rows))


def suffer(name: str, folder: Path) -> Outcome:
    """Start a run, do it harm, and ask the monitor until it has named the fault and the run has ended."""
    fault, run, output = FAULTS[name], RunDir(folder / name), folder / f"{name}.out"
    line, environment = command(folder, run.path, dict(fault.settings)), {**ENVIRONMENT, **fault.environment(folder)}
    with open(output, "wb") as out:
        launcher = subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT, env=environment)
    while (began := fault.strike(run)) is None:
        if launcher.poll() is not None:
            raise SystemExit(f"{name}: the run ended before the fault:\n{output.read_text()[-2000:]}")
        time.sleep(0.02)
    shown: dict[str, float] = {}
    named_s = ended_s = None
    while (named_s is None or ended_s is None) and time.time() - began < LONGEST_S:
        asked, answered = time.time(), 0.0
        monitor = subprocess.Popen(
            [*QDIST, "monitor", str(run.path), "--once"], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        while not answered or time.time() - asked < 1.0:
            answered = answered or (time.time() if monitor.poll() is not None else 0.0)
            if ended_s is None and launcher.poll() is not None:
                ended_s = time.time() - began
            time.sleep(0.02)
        words = messages(monitor.communicate()[0])
        # What is counted in it changes from second to second: 'silent for 12 s'.
        if words and re.sub(r"\d+ s\b", "", words) not in {re.sub(r"\d+ s\b", "", old) for old in shown}:
            shown[words] = answered - began
        if named_s is None and re.search(fault.named, words):
            named_s = answered - began
    if launcher.poll() is None:
        launcher.kill()  # its ranks end with it
    launcher.wait()
    stacks = [rank for rank in (0, 1) if (path := run.stack_file(rank)).is_file() and path.stat().st_size]
    error = re.search(r"^error: .*", output.read_text(errors="replace"), re.MULTILINE | re.DOTALL)
    return Outcome(named_s, ended_s, shown, launcher.returncode, error[0].strip() if error else "no error", stacks)


def messages(screen: str) -> str:
    """What stands below the curves: how the run ended, and warnings."""
    found = re.search(r"^(! |(failed|killed|stopped): ).*", screen, re.MULTILINE | re.DOTALL)
    return " ".join(found[0].split()) if found else ""


def try_what_is_said(name: str, folder: Path, outcome: Outcome) -> list[tuple[str, int]]:
    """What was run, and its exit code; what the error advises is the last."""
    resume = [*QDIST, "launch", "--resume", "--run", str(folder / name)]
    tried = [("resume", finish(resume))]
    if "optim.lr in a new run" in outcome.said:
        tried.append(("resume with a smaller optim.lr", finish([*resume, "--set", "optim.lr=1e-2"])))
        tried.append(("new run with it", finish(command(folder, folder / f"{name}-again", {}))))
    return tried


def finish(arguments: list[str]) -> int:
    """The exit code of a command; what it says at its end is printed where it fails."""
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=LONGEST_S)
    if done.returncode:
        print(f"{' '.join(arguments[2:])}\n  {done.returncode}: {done.stderr.strip()}")
    return done.returncode


def command(folder: Path, run: Path, settings: dict[str, str]) -> list[str]:
    """The command of a run."""
    line = [*QDIST, "launch", "--gpus", "2", "--model", str(folder / "model"), "--load-format", "dummy"]
    return [*line, "--run", str(run), *(f"--set={key}={value}" for key, value in {**SETTINGS, **settings}.items())]


def signalled(number: int) -> Callable[[RunDir], float | None]:
    """Sends a signal to a rank that has trained for a while."""

    def strike(run: RunDir) -> float | None:
        if not run.checkpoint_steps() or run.checkpoint_steps()[-1] < 20:
            return None
        pulse = read_pulses(run)[VICTIM]
        if pulse.pid not in processes(run.path):
            raise SystemExit(f"process {pulse.pid} is not of {run.path}")
        os.kill(pulse.pid, number)
        return time.time()

    return strike


def raised(run: RunDir) -> float | None:
    """When the rank raised, by its own note."""
    note = run.path.parent / "raised-at"
    return float(note.read_text()) if note.is_file() and note.read_text() else None


def not_finite(run: RunDir) -> float | None:
    """When rank 0 wrote down the first step with gradients or a loss that are no numbers."""
    path = run.event_file(0)
    events = decode_lines(path.read_bytes()) if path.exists() else []
    return next((event.time for event in events if event.skipped), None)


def raising(folder: Path) -> dict[str, str]:
    """An environment in which one rank raises in the middle of its training."""
    (folder / "path").mkdir()
    text = SITECUSTOMIZE.format(rank=VICTIM, step=RAISES_AT, note=str(folder / "raised-at"))
    (folder / "path" / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder / "path"), os.environ.get("PYTHONPATH"))))}


def seconds(value: float | None) -> str:
    """For the table."""
    return "never" if value is None else f"{value:.1f} s"


class Fault(NamedTuple):
    """What is done to a run.

    strike: does it, or sees whether it has come; when, in seconds since the epoch, or None for not yet.
    named: a pattern of the monitor's words.
    """

    strike: Callable[[RunDir], float | None]
    named: str
    settings: tuple[tuple[str, str], ...] = ()
    environment: Callable[[Path], dict[str, str]] = lambda _: {}


FAULTS = {
    "stopped": Fault(signalled(signal.SIGSTOP), rf"rank {VICTIM} has been silent .* process is stopped"),
    "killed": Fault(signalled(signal.SIGKILL), rf"rank {VICTIM} (was killed by SIGKILL|.* process is gone)"),
    "raised": Fault(raised, rf"rank {VICTIM} .*ValueError: made by", environment=raising),
    "nan": Fault(not_finite, r"the loss is (nan|inf|not a number)|gradients are NaN or infinite", SURVIVES_NOTHING),
}  # fmt: skip


if __name__ == "__main__":
    main()
