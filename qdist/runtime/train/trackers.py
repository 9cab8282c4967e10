"""Hands the numbers of a run to TensorBoard, W&B, MLflow and trackio, through Accelerate's classes for them.

A tracker that does not start ends the run before it has trained. One that fails later costs its curves a gap and the
run nothing: all numbers are in `events/`.
"""

import json
import os
import sqlite3
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from typing import Any

from qdist.core.errors import RunError
from qdist.core.planning.plan import Plan
from qdist.core.spec.spec import flatten, json_text
from qdist.core.telemetry.events import Event, decode_lines
from qdist.core.text import GIB, format_duration
from qdist.host.files import write_atomic
from qdist.host.launch.trackers import refuse_missing
from qdist.host.opening import read_typed
from qdist.host.run.rundir import RunDir
from qdist.host.terminal import say

KEPT = "trackers.json"
"""Beside the plan: what each tracker calls this run, so that a resumed one goes on in it."""
PROJECT = "qdist"
"""Where the environment names no project or experiment."""

_PAUSE_S = 60.0
"""A tracker that failed is left alone so long, then twice as long, so that a dead server does not slow every step."""
_LOOK_S = 10.0
"""Between two looks at how full the other ranks are."""
_TAIL_BYTES = 4096
_LONGEST = 160  # characters of an error that are told

_FAILURES: tuple[type[Exception], ...] = (
    OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, ImportError, sqlite3.Error,
)  # fmt: skip
"""What a client of somebody else's server raises: its connection, its database, and answers that it did not expect."""
_OWN_FAILURES = {
    "wandb": ("wandb.errors", "Error"),
    "mlflow": ("mlflow.exceptions", "MlflowException"),
    "trackio": ("httpx", "HTTPError"),
}
"""Module and class of the errors that derive from none of those."""
_IN_A_THREAD = ("mlflow",)
"""It writes 10 rows to a database or a server before it returns: 15 ms a step, where the others' clients take 1. Its
run is bound to the thread that started it."""
_REMEDIES = {
    "tensorboard": "free space in the run directory",
    "wandb": "WANDB_MODE=offline, or `wandb login`",
    "mlflow": "unset MLFLOW_TRACKING_URI, or start the server that it names",
    "trackio": "unset TRACKIO_SPACE_ID and TRACKIO_SERVER_URL",
}


def start(plan: Plan, run: RunDir, rank: int) -> "Trackers":
    """Start the trackers that the plan names, on rank 0; on the others there are none.

    Raises MachineError where a package is missing, and RunError, naming the tracker, where one does not start.
    """
    names = tuple(dict.fromkeys(plan.spec.trackers)) if rank == 0 else ()
    refuse_missing(names)
    path, started = run.path / KEPT, []
    kept = read_typed(path, dict[str, str], RunError, try_="take it away") if path.exists() else {}
    for name in names:
        tracker, known_as = _MAKERS[name](run, kept.get(name, ""))
        goes_on = bool(known_as) and known_as == kept.get(name)
        thread = ThreadPoolExecutor(1, f"tracker {name}") if name in _IN_A_THREAD else None
        settings = None if goes_on else _settings(plan)
        try:
            thread.submit(_start, tracker, settings).result() if thread else _start(tracker, settings)
        except failures_of(name) as error:
            raise RunError(f"the tracker {name} did not start: {_said(error)}", try_=_REMEDIES[name]) from error
        if goes_on:
            say(f"tracker {name} goes on in {known_as}")
        kept[name] = known_as or tracker.tracker.info.run_id
        started.append(Guarded(name, tracker, thread=thread))
    if names:
        write_atomic(run.path / KEPT, json.dumps(kept, indent=2) + "\n")
    return Trackers(started, fullest=FullestRank(run, plan.world_size))


def _start(tracker: Any, settings: dict[str, Any] | None) -> None:
    tracker.start()
    if settings is not None:
        tracker.store_init_configuration(settings)


def failures_of(name: str) -> tuple[type[Exception], ...]:
    """What a tracker may raise, its package being installed."""
    if name not in _OWN_FAILURES:
        return _FAILURES
    module, attribute = _OWN_FAILURES[name]
    return (*_FAILURES, getattr(import_module(module), attribute))


def values_of(event: Event, *, fullest_bytes: int = 0) -> dict[str, float]:
    """An event's numbers by the names that trackers show; {} for an event that is neither a step nor an evaluation.

    fullest_bytes: peak of the fullest rank; 0 where it is not known.
    """
    if event.kind not in ("step", "eval"):
        return {}
    names = ("loss", "held_out_loss", "learning_rate", "gradient_norm")
    values = {name: getattr(event, name) for name in names if getattr(event, name) is not None}
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


class Guarded:
    """A tracker whose failures are counted and told once, and stop nothing.

    tracker: one of Accelerate's, started.
    thread: where it was started and is called from then on, so that nobody waits for it but `finish`.
    clock: seconds that only ever grow.
    """

    def __init__(
        self,
        name: str,
        tracker: Any,
        *,
        thread: ThreadPoolExecutor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self._tracker, self._thread, self._clock = name, tracker, thread, clock
        self._failures, self._sent = failures_of(name), deque[Future[None]]()
        self._asked, self._lost, self._error = 0, 0, ""
        self._pause_s, self._silent_until = _PAUSE_S, -1.0

    def log(self, values: dict[str, float], step: int) -> None:
        """Hand numbers over, or lose them."""
        if not self._thread:
            self._log(values, step)
            return
        self._sent.append(self._thread.submit(self._log, values, step))
        while self._sent[0].done() and len(self._sent) > 1:
            self._sent.popleft().result()  # a bug, which is no failure of the tracker, comes out here

    def _log(self, values: dict[str, float], step: int) -> None:
        self._asked += 1
        if self._clock() < self._silent_until:
            self._lost += 1
            return
        try:
            self._tracker.log(values, step=step)
        except self._failures as error:
            self._lost += 1
            self._fail(error)
        else:
            self._pause_s = _PAUSE_S

    def finish(self) -> str:
        """Send what is left; a sentence about what was lost, or ''."""
        if self._thread:
            self._sent.append(self._thread.submit(self._finish))
            for sent in self._sent:
                sent.result()
            self._thread.shutdown()
        else:
            self._finish()
        if not self._error:
            return ""
        return f"tracker {self.name} lost {self._lost} of {self._asked} entries: {self._error}"

    def _finish(self) -> None:
        try:
            self._tracker.finish()
        except self._failures as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._error:
            pause = format_duration(self._pause_s)
            say(f"warning: the tracker {self.name} failed and is asked again in {pause}: {_said(error)}")
        self._error = _said(error)
        self._silent_until = self._clock() + self._pause_s
        self._pause_s *= 2


class FullestRank:
    """The peak of the fullest of so many ranks, from the last line of each one's events; looked up now and then."""

    def __init__(self, run: RunDir, world_size: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._files, self._clock = [run.event_file(rank) for rank in range(world_size)], clock
        self._bytes, self._next = 0, -1.0

    def __call__(self) -> int:
        """Bytes; 0 while nobody has said anything."""
        if self._clock() >= self._next:
            self._next = self._clock() + _LOOK_S
            self._bytes = max((_last_peak(path) for path in self._files if path.exists()), default=0)
        return self._bytes


def _last_peak(path: Any) -> int:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
    whole = tail if size <= _TAIL_BYTES else tail[tail.find(b"\n") + 1 :]
    # Peaks start anew when the ranks do, so the last word counts, not the largest.
    return next((event.memory_bytes for event in reversed(decode_lines(whole))), 0)


class Trackers:
    """All trackers of a run; none on ranks other than 0."""

    def __init__(self, started: Sequence[Guarded], *, fullest: Callable[[], int]) -> None:
        self._open, self._fullest = list(started), fullest

    def log(self, event: Event) -> None:
        """Hand a step's or an evaluation's numbers to each."""
        if self._open and (values := values_of(event, fullest_bytes=self._fullest())):
            for tracker in self._open:
                tracker.log(values, event.step)

    def finish(self) -> str:
        """Close them; what they lost, in a sentence each, or ''. A second call does nothing."""
        said = [sentence for tracker in self._open if (sentence := tracker.finish())]
        self._open.clear()
        for sentence in said:
            say(f"warning: {sentence}; all of them are in events/")
        return "; ".join(said)


def _tensorboard(run: RunDir, known_as: str) -> tuple[Any, str]:
    """Its files lie in the run directory; a resumed run hides the steps that it takes back."""
    from accelerate.tracking import TensorBoardTracker

    steps = run.checkpoint_steps()
    purge = {"purge_step": steps[-1] + 1 if steps else 0} if known_as else {}
    return TensorBoardTracker("", str(run.path / "tensorboard"), **purge), "tensorboard"


def _wandb(run: RunDir, known_as: str) -> tuple[Any, str]:
    """WANDB_MODE, WANDB_PROJECT and WANDB_DIR are honoured; without the last its files lie in the run directory."""
    from accelerate.tracking import WandBTracker

    options: dict[str, Any] = {"name": run.path.name, "id": known_as or uuid.uuid4().hex[:12]}
    if known_as:
        options["resume"] = "allow"
    if "WANDB_DIR" not in os.environ:
        options["dir"] = str(run.path)
    return WandBTracker(os.environ.get("WANDB_PROJECT") or PROJECT, **options), options["id"]


def _mlflow(run: RunDir, known_as: str) -> tuple[Any, str]:
    """Into the store that MLFLOW_TRACKING_URI names, else into a database in the run directory.

    A run that another store knows is a new one here. MLflow names new runs itself.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # 7 by default: minutes, while all ranks wait
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    folder = None
    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{run.path.resolve() / 'mlflow.db'}"
        folder = (run.path / "mlflow").resolve().as_uri()
    from accelerate.tracking import MLflowTracker

    known = bool(known_as) and _mlflow_knows(known_as)
    tracker = MLflowTracker(PROJECT, folder, run_id=known_as if known else None, run_name=run.path.name)
    return tracker, known_as if known else ""


def _mlflow_knows(run_id: str) -> bool:
    try:
        import_module("mlflow").get_run(run_id)
    except failures_of("mlflow"):
        return False
    return True


def _trackio(run: RunDir, known_as: str) -> tuple[Any, str]:
    """Into TRACKIO_DIR, or the Space or server that the environment names; else into the run directory."""
    os.environ.setdefault("TRACKIO_DIR", str(run.path.resolve() / "trackio"))  # read when trackio is imported
    from accelerate.tracking import TrackioTracker

    name = known_as or f"{run.path.name}-{uuid.uuid4().hex[:6]}"
    project = os.environ.get("TRACKIO_PROJECT") or PROJECT
    return TrackioTracker(project, name=name, resume="allow" if known_as else "never", embed=False), name


_MAKERS: dict[str, Callable[[RunDir, str], tuple[Any, str]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
"""From the run and what the tracker called it before, or '': Accelerate's tracker, and what it calls the run now."""


def _settings(plan: Plan) -> dict[str, Any]:
    """Each setting by its dotted key, as trackers take them."""
    return {
        key: value if isinstance(value, (int, float, str, bool)) else json_text(value)
        for key, value in flatten(plan.spec).items()
    }


def _said(error: Exception) -> str:
    """Its name and the beginning of its first line: clients put whole requests into theirs."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:_LONGEST]}{'...' if len(first) > _LONGEST else ''}"
