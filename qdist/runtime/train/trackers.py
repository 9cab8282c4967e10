"""Sends a run's numbers to one tracker: `python -m qdist.runtime.train.trackers RUN NAME`, next to the ranks.

It follows `events/` through Accelerate's classes for TensorBoard, W&B, MLflow and trackio, notes how far it has come,
and ends once standard input has. Whatever a tracker raises ends this process alone: the launcher starts another.
"""

import os
import select
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import msgspec

from qdist.core.errors import QdistError
from qdist.core.planning.plan import Plan
from qdist.core.spec.keys import json_text
from qdist.core.spec.run_spec import flatten
from qdist.core.telemetry.events import Event
from qdist.core.text import GIB
from qdist.host.files import locked, told_of_disks, write_atomic
from qdist.host.launch.trackers import Sent, refuse_missing, sent_file, sent_to
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import PLAN, RunDir
from qdist.host.terminal import say

PROJECT = "qdist"
"""Default where the environment names no project or experiment."""
_POLL_S = 1.0


class Goal(NamedTuple):
    """Destination of a tracker's numbers."""

    run: RunDir
    known_as: str = ""
    """The tracker's earlier id for the run."""
    redone: int | None = None
    """The first step that the tracker already has and that is repeated; None if there is none."""


class Numbered(NamedTuple):
    """An event of any rank."""

    number: int
    """How many of rank 0's events there are up to this one."""
    event: Event


def main() -> None:
    """Track until standard input ends."""
    from accelerate import PartialState

    PartialState(cpu=True)  # or Accelerate looks for GPUs, and holds memory there
    run, name = RunDir(sys.argv[1]), sys.argv[2]
    refuse_missing((name,))
    path = sent_file(run, name)
    path.parent.mkdir(exist_ok=True)
    with locked(path.with_suffix(".lock"), busy=f"{name} is being sent this run by another process"):
        follow(run, name, ended=_input_ended)


def _input_ended() -> bool:
    """Wait a moment; whether standard input has ended. The launcher writes nothing: readable means ended."""
    return bool(select.select([sys.stdin], [], [], _POLL_S)[0])


def follow(run: RunDir, name: str, *, ended: Callable[[], bool]) -> None:
    """Send a tracker what it lacks, then new events until the run has ended. Raises what the tracker does.

    ended: called before each further look at the events.
    """
    plan, sent, follower = run.plan(), sent_to(run, name), Follower(run.path)
    numbered = list(_numbered(follower.new_events(), 0))
    count = numbered[-1].number if numbered else 0
    goes_on_from = _goes_on_from(run, numbered)
    unsent, redone = _still_true(numbered, sent.events, goes_on_from)
    tracker, known_as = _MAKERS[name](Goal(run, sent.known_as, redone))
    tracker.start()
    if known_as and known_as == sent.known_as:
        say(f"tracker {name} goes on in {known_as}")
    else:
        tracker.store_init_configuration(_settings(plan))
        sent = Sent(known_as=known_as or tracker.tracker.info.run_id)
        unsent, _ = _still_true(numbered, 0, goes_on_from)
    handed = _Handed(run, name, tracker, sent)
    while True:
        handed.send(unsent)
        if ended():
            break
        unsent = list(_numbered(follower.new_events(), count))
        count = unsent[-1].number if unsent else count
    handed.send(_numbered(follower.new_events(), count))
    tracker.finish()


def _numbered(events: Iterable[Event], count: int) -> Iterator[Numbered]:
    for event in events:
        count += event.rank == 0
        yield Numbered(count, event)


def _goes_on_from(run: RunDir, numbered: Iterable[Numbered]) -> int | None:
    """The step that the ranks will resume from; None once they have reported it themselves."""
    planned = (run.path / PLAN).stat().st_mtime
    if any(event.kind in ("start", "resume") and event.time >= planned for _, event in numbered):
        return None
    return next(reversed(run.checkpoint_steps()), 0)


def _still_true(numbered: Iterable[Numbered], sent: int, goes_on_from: int | None) -> tuple[list[Numbered], int | None]:
    """What is left to send, without undone steps; and the first step that is repeated, if any."""
    kept: list[Numbered] = []
    cuts: list[int] = []

    def cut(step: int) -> None:
        cuts.append(step)
        kept[:] = [one for one in kept if one.event.rank or one.event.step <= step]

    for one in numbered:
        if one.event.rank == 0 and one.number <= sent:
            continue
        if one.event.rank == 0 and one.event.kind in ("start", "resume"):
            cut(one.event.step)
        kept.append(one)
    if goes_on_from is not None:
        cut(goes_on_from)
    return kept, min(cuts) + 1 if cuts else None


class _Handed:
    """What was sent to a tracker, recorded in the run directory."""

    def __init__(self, run: RunDir, name: str, tracker: Any, sent: Sent) -> None:
        self._path, self._tracker, self._sent = sent_file(run, name), tracker, sent
        self._peaks: dict[int, int] = {}
        self._note()

    def send(self, numbered: Iterable[Numbered]) -> None:
        """Send rank 0's steps and evaluations."""
        before = self._sent
        try:
            for number, event in numbered:
                self._peaks[event.rank] = event.memory_bytes or self._peaks.get(event.rank, 0)
                if event.rank == 0:
                    if values := values_of(event, fullest_bytes=max(self._peaks.values())):
                        self._tracker.log(values, step=event.step)
                    self._sent = msgspec.structs.replace(self._sent, events=number, step=event.step)
        finally:
            if self._sent != before:
                self._note()

    def _note(self) -> None:
        write_atomic(self._path, msgspec.json.format(msgspec.json.encode(self._sent), indent=2) + b"\n")


def values_of(event: Event, *, fullest_bytes: int = 0) -> dict[str, float]:
    """An event's numbers by the names that trackers show; {} for other events than steps and evaluations.

    fullest_bytes: peak of the fullest rank; 0 where it is not known.
    """
    if event.kind not in ("step", "eval"):
        return {}
    names = ("loss", "held_out_loss", "learning_rate", "gradient_norm")
    values = {name: getattr(event, name) for name in names if getattr(event, name) is not None}
    if event.figure is not None:
        values[event.task] = event.figure
    if event.kind == "step":
        values |= {"seconds": event.seconds, "data_seconds": event.data_s}
    if event.tokens and event.seconds > 0:
        values["tokens_per_second"] = event.tokens / event.seconds
    if event.tokens + event.padding:
        values["padding_share"] = event.padding / (event.tokens + event.padding)
    if event.memory_bytes:
        values["memory_peak_gib"] = event.memory_bytes / GIB
        values["memory_peak_fullest_gib"] = max(event.memory_bytes, fullest_bytes) / GIB
    return values


def _tensorboard(goal: Goal) -> tuple[Any, str]:
    """Files go to the run directory; repeated steps hide the earlier ones."""
    from accelerate.tracking import TensorBoardTracker

    purge = {} if goal.redone is None or not goal.known_as else {"purge_step": goal.redone}
    return TensorBoardTracker("", str(goal.run.path / "tensorboard"), **purge), "tensorboard"


def _wandb(goal: Goal) -> tuple[Any, str]:
    """Honours WANDB_MODE, WANDB_PROJECT and WANDB_DIR; without the last, files go to the run directory."""
    from accelerate.tracking import WandBTracker

    options: dict[str, Any] = {"name": goal.run.path.name, "id": goal.known_as or uuid.uuid4().hex[:12]}
    if goal.known_as:
        options["resume"] = "allow"
    if "WANDB_DIR" not in os.environ:
        options["dir"] = str(goal.run.path)
    return WandBTracker(os.environ.get("WANDB_PROJECT") or PROJECT, **options), options["id"]


def _mlflow(goal: Goal) -> tuple[Any, str]:
    """Uses the store that MLFLOW_TRACKING_URI names, else a database in the run directory.

    A run that another store knows is a new one here. MLflow names new runs itself.
    """
    folder = None
    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{goal.run.path.resolve() / 'mlflow.db'}"
        folder = (goal.run.path / "mlflow").resolve().as_uri()
    from accelerate.tracking import MLflowTracker

    known = bool(goal.known_as) and _mlflow_knows(goal.known_as)
    tracker = MLflowTracker(PROJECT, folder, run_id=goal.known_as if known else None, run_name=goal.run.path.name)
    return tracker, goal.known_as if known else ""


def _mlflow_knows(run_id: str) -> bool:
    """Whether the store has the run. A store that does not answer is an error, not a new run."""
    mlflow = import_module("mlflow")
    try:
        mlflow.get_run(run_id)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def _trackio(goal: Goal) -> tuple[Any, str]:
    """Uses TRACKIO_DIR, or the Space or server that the environment names; else the run directory."""
    os.environ.setdefault("TRACKIO_DIR", str(goal.run.path.resolve() / "trackio"))  # read when trackio is imported
    from accelerate.tracking import TrackioTracker

    name = goal.known_as or f"{goal.run.path.name}-{uuid.uuid4().hex[:6]}"
    project = os.environ.get("TRACKIO_PROJECT") or PROJECT
    return TrackioTracker(project, name=name, resume="allow" if goal.known_as else "never", embed=False), name


_MAKERS: dict[str, Callable[[Goal], tuple[Any, str]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
"""Accelerate's tracker, and its id for the run; '' if known only after it has started."""


def _settings(plan: Plan) -> dict[str, Any]:
    """Each setting by its dotted key, in a form that trackers accept."""
    return {
        key: value if isinstance(value, (int, float, str, bool)) else json_text(value)
        for key, value in flatten(plan.spec).items()
    }


if __name__ == "__main__":
    try:
        with told_of_disks():
            main()
    except QdistError as error:
        raise SystemExit(f"error: {error.message}") from None  # into the tracker's log, where the launcher looks
