"""Trackers of a run: their packages, and the processes that send them its numbers without disturbing its ranks."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType

import msgspec

from qdist.core.errors import MachineError, RunError
from qdist.core.text import format_duration, resuming
from qdist.host import children
from qdist.host.opening import read_typed
from qdist.host.run.rundir import RunDir
from qdist.host.run.state import find_reason, read_new_lines

PACKAGES = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "trackio": ("trackio",),
}
"""Tracker -> alternative packages, the one to install first; mlflow-skinny only talks to servers."""
REMEDIES = {
    "tensorboard": "free space in the run directory",
    "wandb": "WANDB_MODE=offline, or `wandb login`",
    "mlflow": "unset MLFLOW_TRACKING_URI, or start the server that it names",
    "trackio": "unset TRACKIO_SPACE_ID and TRACKIO_SERVER_URL",
}

_MODULE = ("-P", "-m", "qdist.runtime.train.trackers")
_PAUSE_S = 60.0
"""Seconds before a failed tracker process is restarted; doubled each further time."""
_PATIENCE_S, _SOON_S = 30.0, 2.0
"""Seconds that the end of a run waits for its trackers, and how many of them silently."""
_LONGEST = 160  # characters of an error that are told: clients put whole requests into theirs


class Sent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What has been sent to a tracker."""

    known_as: str = ""
    """The tracker's id for the run, so that a resumed run continues in it."""
    events: int = 0
    """Lines of rank 0's events that were sent or need not be."""
    step: int = 0
    """The last step that was sent."""


def sent_file(run: RunDir, name: str) -> Path:
    """The file in which a tracker's process records what it has sent."""
    return run.path / "trackers" / f"{name}.json"


def sent_to(run: RunDir, name: str) -> Sent:
    """What has been sent to a tracker so far."""
    path = sent_file(run, name)
    return read_typed(path, Sent, RunError, try_=f"take {path} away") if path.exists() else Sent()


class Tracking:
    """A context that runs one process per tracker to send the run's events; failures are reported, never raised.

    A process that ends is started again after a pause, and goes on where it stopped.

    say: called with a line for the user. clock: seconds that only ever grow.
    patience_s: how long the end waits for what is not sent yet; None for ever.
    """

    def __init__(
        self,
        run: RunDir,
        names: Iterable[str],
        *,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        patience_s: float | None = _PATIENCE_S,
    ) -> None:
        self._say, self._clock, self._patience_s = say, clock, patience_s
        self._senders = [_Sender(run, name) for name in dict.fromkeys(names)]

    def __enter__(self) -> "Tracking":
        for sender in self._senders:
            sender.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def look(self) -> None:
        """Report processes that ended, and restart them when due. Returns at once; call it regularly."""
        for sender in self._senders:
            if sender.is_running():
                continue
            if sender.due is None:
                if sender.pause_s == _PAUSE_S:
                    pause = format_duration(sender.pause_s)
                    self._say(
                        f"warning: the tracker {sender.name} failed and is started again in {pause}: "
                        f"{sender.reason()}; try {REMEDIES[sender.name]}"
                    )
                sender.due, sender.pause_s = self._clock() + sender.pause_s, 2 * sender.pause_s
            elif self._clock() >= sender.due:
                sender.start()

    def _finish(self) -> None:
        """Wait a limited time for the rest to be sent; report what was not."""
        for sender in self._senders:
            if not sender.is_running():
                sender.start()
            sender.close()
        with contextlib.suppress(KeyboardInterrupt):  # the run itself has ended
            self._wait(_SOON_S)
            late = [sender.name for sender in self._senders if sender.is_running()]
            if late and self._patience_s:
                self._say(f"waiting up to {format_duration(self._patience_s)} for {', '.join(late)}")
            self._wait(self._patience_s)
        for sender in self._senders:
            if why := sender.ending():
                self._say(
                    f"warning: the tracker {sender.name} has this run up to step {sender.step()}: {why}; all numbers "
                    f"are in {sender.run.events}; send the rest: {resuming(sender.run.path)}"
                )

    def _wait(self, patience_s: float | None) -> None:
        end = None if patience_s is None else self._clock() + patience_s
        for sender in self._senders:
            sender.wait(None if end is None else max(0.0, end - self._clock()))


def send_rest(run: RunDir, *, say: Callable[[str], None]) -> None:
    """Send the trackers of an ended run whatever they lack."""
    path = run.event_file(0)
    there = path.read_bytes().count(b"\n") if path.exists() else 0
    behind = [name for name in run.plan().spec.trackers if sent_to(run, name).events < there]
    with Tracking(run, behind, say=say, patience_s=None):
        if behind:
            say(f"sending what is left to {', '.join(behind)}")


class _Sender:
    """The process of one tracker."""

    def __init__(self, run: RunDir, name: str) -> None:
        self.run, self.name = run, name
        self.due: float | None = None
        """When to restart it; None while it runs, or until its end is noticed."""
        self.pause_s = _PAUSE_S
        self._process: subprocess.Popen[bytes] | None = None
        self._log, self._logged, self._broken = run.logs / f"tracker-{name}.log", 0, ""

    def start(self) -> None:
        """Start the process. A failure to start is treated as if it had ended."""
        self.close()
        self._process, self.due, self._broken = None, None, ""
        try:
            with open(self._log, "ab") as log:
                self._logged = log.tell()
                self._process = subprocess.Popen(
                    [sys.executable, *_MODULE, self.run.path, self.name],
                    env=children.environment(),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=children.ending_with_this(),
                )
        except OSError as error:
            self._broken = str(error)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """Signal that no more events will come."""
        if self._process and self._process.stdin:
            self._process.stdin.close()

    def wait(self, seconds: float | None) -> None:
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def ending(self) -> str:
        """Why it has not sent everything; empty if it has. A process still at work is killed."""
        if self._process and self.is_running():
            os.killpg(self._process.pid, signal.SIGKILL)  # with what clients start of their own
            self._process.wait()
            return "it did not answer in time"
        return self.reason() if self._process is None or self._process.returncode else ""

    def reason(self) -> str:
        """Why it ended, briefly."""
        lines = read_new_lines(self._log, {self._log: self._logged})
        why = self._broken or find_reason(lines) or f"see {self._log}"
        return why if len(why) <= _LONGEST else f"{why[:_LONGEST]}..."

    def step(self) -> int:
        """The last step that was sent."""
        with contextlib.suppress(RunError):
            return sent_to(self.run, self.name).step
        return 0


def refuse_missing(
    trackers: Iterable[str],
    *,
    version_of: Callable[[str], str] = metadata.version,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Raise MachineError for the first tracker whose package is missing: Accelerate would silently drop it.

    Metadata is asked, not the import system, for which a folder `./wandb` that holds curves is a package.
    """
    for tracker in trackers:
        package, *others = PACKAGES[tracker]
        if "MLFLOW_TRACKING_URI" not in environment:
            others = []
        if not any(_installed(each, version_of) for each in (package, *others)):
            raise MachineError(
                f"trackers={tracker} needs the package {package}, which is not installed",
                try_=f"pip install {package}, or leave {tracker} out of trackers",
            )


def _installed(package: str, version_of: Callable[[str], str]) -> bool:
    try:
        version_of(package)
    except metadata.PackageNotFoundError:
        return False
    return True
