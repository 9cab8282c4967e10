"""A run's directory: its files, its plan and the commands that launched and resumed it."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from qdist.core.errors import RunError, nearest
from qdist.core.machine.cluster import Cluster
from qdist.core.planning.plan import VERSION, Plan, digest, upgraded
from qdist.core.telemetry.events import Count
from qdist.core.text import resuming
from qdist.host.files import BESIDE, write_atomic
from qdist.host.opening import converted, read_bytes, read_object

PLAN, RESULT, STOP, LOCK = "plan.json", "result.json", "stop", ".lock"
ENDED, MACHINE = "ended.json", "machine.json"
NODES = "nodes.jsonl"
"""What happened to the nodes of a run of several."""
_AGAIN = "start the run again"
_WRITTEN = ("steps", "adapter_bytes", "adapter_parameters", "peaks", "tokens_per_s", "start_seconds")
T = TypeVar("T")
_AT_FIRST = re.compile(
    rf"(agent\d+)?\.lock|prepared\d+\.json|(recipe\.toml|(machine|versions|deepspeed|accelerate)\.json|launch\.sh)|{BESIDE}"
)
"""Names of files that are written before the plan."""


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a launch ended before the run's last step."""

    state: Literal["failed", "stopped"]
    """stopped: on request of the user or a scheduler, after saving."""
    message: str = ""
    """The error as printed."""
    try_: str = ""
    time: float
    """When it ended, in seconds since the epoch."""


class _Speeds(msgspec.Struct):
    measured: float | None


class _Answer(msgspec.Struct):
    question: str
    before: str
    after: str
    expected: str


class _Peak(msgspec.Struct):
    allocated: Count
    context: Count


class _Held(msgspec.Struct):
    weights: Count
    adapter: Count
    gradients: Count
    optimizer: Count


class _Start(msgspec.Struct):
    load: float | None
    first_step: float | None


class _Loading(msgspec.Struct):
    seconds: float
    read_bytes: Count


class _Result(msgspec.Struct):
    """The types of the fields of `result.json`."""

    steps: Count = 0
    ended_early: str = ""
    held_out: list[tuple[Count, float]] = []
    tasks: dict[str, list[tuple[Count, float]]] = {}
    answers: list[_Answer] = []
    adapter_bytes: Count = 0
    adapter_parameters: Count = 0
    peak_bytes: dict[str, Count] = {}
    peaks: list[list[_Peak]] = []
    held: list[_Held] = []
    tokens_per_s: _Speeds | msgspec.UnsetType = msgspec.UNSET
    start_seconds: _Start | msgspec.UnsetType = msgspec.UNSET
    loading: _Loading | msgspec.UnsetType = msgspec.UNSET
    starting: dict[str, float] = {}


class RunDir:
    """Paths and basic facts of one run. Creating the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def events(self) -> Path:
        return self.path / "events"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def pulses(self) -> Path:
        return self.path / "pulse"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def event_file(self, rank: int) -> Path:
        return self.events / f"rank{rank:03d}.jsonl"

    def log_file(self, rank: int) -> Path:
        return self.logs / f"rank{rank:03d}.log"

    def pulse_file(self, rank: int) -> Path:
        return self.pulses / f"rank{rank:03d}.json"

    def stack_file(self, rank: int) -> Path:
        return self.stacks / f"rank{rank:03d}.txt"

    def exists(self) -> bool:
        return (self.path / PLAN).is_file()

    def is_bare(self) -> bool:
        """Whether the directory is empty, or holds only what a launch killed at its start leaves."""
        folders = {folder.name for folder in (self.events, self.logs, self.checkpoints, self.pulses, self.stacks)}
        return all(
            not any(path.iterdir()) if path.name in folders and path.is_dir() else _AT_FIRST.fullmatch(path.name)
            for path in self.path.iterdir()
        )

    def plan(self) -> Plan:
        """The run's plan. Raises RunError if there is none or it is of another version."""
        path = self.path / PLAN
        if not os.path.lexists(path):
            raise RunError(f"{self.path} is not a run: it has no {PLAN}", try_=self._runs_nearby())
        found = upgraded(read_object(path, RunError, try_=_AGAIN))
        version = found.get("version")
        if version != VERSION:
            raise RunError(
                f"{self.path} was planned by another qdist (plan version {version}, this one reads {VERSION})"
            )
        return converted(found, Plan, f"{path} is not a plan", RunError, try_=_AGAIN)

    def _runs_nearby(self) -> str:
        """Runs inside this folder, next to it, or in `runs/`: candidates for what the user meant."""
        for folder in (self.path, self.path.parent, Path("runs")):
            found = {plan.parent.name: str(plan.parent) for plan in sorted(folder.glob(f"*/{PLAN}"))}
            if found:
                close = nearest(self.path.name, found)
                return found[close] if close else ", ".join([*found.values()][:5])
        return "a folder that `qdist launch` made"

    def checked_plan(self, expected_digest: str) -> Plan:
        """The plan; raises if it is not the one that was launched."""
        plan = self.plan()
        found = digest(plan)
        if found != expected_digest:
            raise RunError(
                f"{self.path / PLAN} has digest {found[:12]}, but this run was launched with {expected_digest[:12]}",
                try_="start it with `qdist launch --resume`, which renders plan and script together",
            )
        return plan

    def training_stamp(self) -> list[int]:
        """Distinguishes one training of the run from another, by when its files were written.

        Of a model's folder in place of a run's, one writing of it; empty for what is neither.
        """
        weights = sorted(self.path.glob("*.safetensors"))
        files = (self.path / PLAN, self.adapter / "adapter_model.safetensors", *weights)
        return [file.stat().st_mtime_ns for file in files if file.is_file()]

    def checkpoint_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; one without DONE does not count."""
        if not self.checkpoints.is_dir():
            return []
        numbered = [(path, re.fullmatch(r"step_(\d{6,})", path.name)) for path in self.checkpoints.iterdir()]
        return sorted(int(name[1]) for path, name in numbered if name and (path / "DONE").is_file())

    def last_saved(self) -> str:
        """'the last checkpoint is of step 40', for use in an error."""
        steps = self.checkpoint_steps()
        return f"the last checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def result(self) -> dict[str, Any] | None:
        """The result that a finished run wrote, or None while it is unfinished."""
        found = _object(self.path / RESULT)
        if found is not None:
            converted(found, _Result, str(self.path / RESULT), RunError, try_=resuming(self.path))
        return found

    def result_of(self, plan: Plan, *, whole: bool = False) -> dict[str, Any] | None:
        """The result of a given plan. Raises RunError if it belongs to other ranks.

        whole: also raise if it lacks what a run of this version writes.
        """
        found = self.result() or {}
        lacking = [key for key in _WRITTEN if key not in found] if whole else []
        each = [len(rank.expected) for rank in plan.ranks]
        peaks, held = found.get("peaks"), found.get("held")
        others = (peaks is not None and [len(of_rank) for of_rank in peaks] != each) or len(held or each) != len(each)
        if lacking or others:
            why = f"lacks {', '.join(lacking)}" if lacking else "is of other ranks than the plan's"
            raise RunError(f"{self.path / RESULT} {why}", try_=_AGAIN)
        return found or None

    def ended(self) -> Ended | None:
        """How the last launch ended if it did not finish; None while it runs or if that is unknown."""
        return _typed(self.path / ENDED, Ended)

    def machine(self) -> Cluster | None:
        """The machine as the last launch saw it."""
        return _typed(self.path / MACHINE, Cluster)

    def stop_requested(self) -> bool:
        return (self.path / STOP).exists()


def _object(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if the file is missing or was removed."""
    try:
        return read_object(path, RunError, try_=_AGAIN)
    except RunError:
        if os.path.lexists(path):
            raise
        return None


def _typed(path: Path, kind: type[T]) -> T | None:
    found = _object(path)
    return None if found is None else converted(found, kind, f"{path} is of another qdist", RunError, try_=_AGAIN)


def of_ranks(folder: Path, suffix: str) -> list[Path]:
    """The ranks' files in a folder, in rank order, matched by full name: copies next to them are ignored."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(names) if re.fullmatch(rf"rank\d{{3,}}{re.escape(suffix)}", name)]


def free_name(parent: Path, stem: str) -> Path:
    """`parent/stem`, or the first of `stem-2`, `stem-3`, ... that does not exist."""
    candidate, number = parent / stem, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = parent / f"{stem}-{number}"
    return candidate


COMMANDS = "command.txt"


def note(run: RunDir, argv: Sequence[str]) -> None:
    """Append a launch to the list of launches. argv: the process's; of its program only the name is kept."""
    program, *arguments = argv
    # What holds a line break is quoted; bash reads one back from $'\n', and a command stays one line.
    line = shlex.join((Path(program).name, *arguments)).replace("\n", "'$'\\n''")
    write_atomic(run.path / COMMANDS, "".join(f"{known}\n" for known in (*noted(run), line)))


def noted(run: RunDir) -> tuple[str, ...]:
    """Every launch, first to last; empty for a run of a qdist that recorded none."""
    path = run.path / COMMANDS
    return tuple(read_bytes(path, RunError).decode(errors="replace").splitlines()) if os.path.lexists(path) else ()
