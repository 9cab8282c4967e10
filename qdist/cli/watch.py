"""Shows a run while it runs: a live view on a terminal, a plain line a step elsewhere; and its ending."""

import sys
import time
from types import TracebackType

from rich.console import Console

from qdist.cli.views.dashboard import dashboard
from qdist.cli.views.plan import outcome_rows, start_line
from qdist.cli.views.screen import Painter
from qdist.cli.views.text import answers, comparison, plain_lines
from qdist.core.data import demo
from qdist.core.errors import QdistError
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.events import Event
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.memory_report import MEANING
from qdist.core.telemetry.snapshot import Snapshot
from qdist.core.telemetry.warnings import held_out_warnings
from qdist.core.text import command, format_bytes, format_count, resuming
from qdist.host.run.observer import RunObserver
from qdist.host.run.rundir import RunDir
from qdist.host.terminal import say

_DRAW_S, _MOST_LINES = 0.5, 22
_MOST_SHARE = 0.05
"""Most of a core to spend on drawing: a curve of a million steps takes 0.16 s, and the ranks may need every core."""


class Watch:
    """A context in which events are shown as they come.

    run: its folder, where ranks leave their beats. width: of the terminal, for output that is not a terminal's.
    """

    def __init__(self, plan: Plan, run: RunDir, *, width: int) -> None:
        self._run = run
        self._state = RunHistory(total_steps=plan.steps)
        self._look: RunObserver | None = None
        self._console = Console(width=None if sys.stdout.isatty() else width, highlight=False)
        self._due, self._unseen = 0.0, ""
        drawable = sys.stdout.isatty() and not self._console.is_dumb_terminal
        self._painter = Painter(self._console, full=False) if drawable else None

    def __enter__(self) -> "Watch":
        if self._painter:
            self._painter.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._painter:
            self._draw(self._painter)
            self._painter.leave()

    def recall(self, events: list[Event]) -> None:
        """Add events from before the run was resumed, without showing them again."""
        self._state.add(events)

    def show(self, events: list[Event]) -> None:
        """Add new events of the ranks."""
        self._state.add(events)
        if self._painter:
            for event in events:
                if event.rank == 0 and event.kind == "inventory":
                    for line in plain_lines(event):
                        self.say(line)
            if (began := time.monotonic()) >= self._due:
                self._draw(self._painter)
                now = time.monotonic()
                self._due = now + max(_DRAW_S, (now - began) / _MOST_SHARE)
            return
        left_s = self._state.seconds_left if events else None
        for event in events:
            if event.rank == 0:
                for line in plain_lines(event, left_s=left_s):
                    say(line)

    def say(self, text: str) -> None:
        """Print a line for the user above the live view."""
        if self._painter:
            self._painter.clear()
            self._due = 0.0
        say(text)

    def _draw(self, painter: Painter) -> None:
        width, height = self._console.size
        try:
            snapshot = self._snapshot()
        except (QdistError, OSError) as error:  # the ranks need no view of them
            if str(error) != self._unseen:
                self._unseen = str(error)
                self.say(f"the view stands still: {error}")
            return
        painter.draw(dashboard(snapshot, width, max(1, min(_MOST_LINES, height - 2)), foot=""))

    def _snapshot(self) -> Snapshot:
        self._look = self._look or RunObserver(self._run, fold=self._state)
        # What ended it is said below the view.
        return self._look.snapshot()._replace(message="", try_="")


def how_to_go_on(run: RunDir, *flags: object) -> str:
    """What is kept of a run that was stopped, and the command that goes on with it. flags: further words of that."""
    steps = run.checkpoint_steps()
    kept = f"the checkpoint of step {steps[-1]} is saved" if steps else "there is no checkpoint yet"
    return f"{kept}\n  go on: {resuming(run.path, *flags)}"


def ending(run: RunDir, plan: Plan) -> None:
    """Held-out loss and answers before and after, memory and speed predicted and measured, and what to do next."""
    result = run.result_of(plan, whole=True) or {}
    console = Console()
    rows = []
    if len(result.get("held_out", [])) > 1:
        (_, before), (_, after) = result["held_out"][0], result["held_out"][-1]
        rows.append(("held-out loss", f"{before:.3f}", f"{after:.3f}"))
    for task, points in result.get("tasks", {}).items():
        rows.append((task, f"{points[0][1]:.4g}", f"{points[-1][1]:.4g}"))
    if result.get("ended_early"):
        say(result["ended_early"])
    if rows:
        console.print()
        console.print(comparison(rows, ("", "before", "after")))
        for warning in held_out_warnings([(step, loss) for step, loss in result["held_out"]]):
            say(warning.text)
    console.print()
    console.print(comparison(outcome_rows(plan, result), ("", "predicted", "measured", "error")))
    say(MEANING)
    if started := start_line(result):
        say(started)
    if result.get("answers"):
        console.print()
        console.print(
            answers([(row["question"], row["before"], row["after"], row["expected"]) for row in result["answers"]])
        )
    measured = result["tokens_per_s"]["measured"]
    speed = f", {format_count(measured)} tok/s" if measured else ""
    say(
        f"\nadapter  {run.adapter}: {format_count(result['adapter_parameters'])} parameters, "
        f"{format_bytes(result['adapter_bytes'])}{speed}"
    )
    system = ("--system", demo.SYSTEM) if plan.spec.data.path == demo.NAME else ()
    if plan.source.tokenizer:
        say(f"chat     {command('chat', run.path, *system)}")
    say(f"merge    {command('merge', run.path, '--out', run.path / 'merged')}")
