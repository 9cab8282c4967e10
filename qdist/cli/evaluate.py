"""`qdist evaluate`: tasks that measure runs and models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from qdist.cli.flags import SettingsCommand, flags_of, setting_flags
from qdist.cli.views.evaluation import evaluation_lines
from qdist.cli.views.text import terminal_width
from qdist.core.composed import request_of
from qdist.core.evaluation.asked import Asked
from qdist.core.evaluation.comparison import comparison_of
from qdist.core.evaluation.judging import JudgeSettings
from qdist.core.spec.lookup import typed_settings
from qdist.core.telemetry.events import Event
from qdist.host.files import file_to_write, write_out
from qdist.host.launch.evaluating import evaluate as evaluate_all
from qdist.host.progress import ProgressLine
from qdist.host.terminal import say, say_json

SETTINGS = ("gpus", "placement", "gpus_per_group", "max_memory", "bits", "method", "trust_remote_code")


@click.command(cls=SettingsCommand)
@click.argument("targets", nargs=-1, metavar="[TARGET...]")
@flags_of(Asked)
@flags_of(JudgeSettings)
@setting_flags(*SETTINGS)
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Another setting, such as dtype=float32."
)
def evaluate(targets: tuple[str, ...], assignments: tuple[str, ...], **given: Any) -> None:
    """Measure TARGETS (runs, or models) by tasks, on every GPU.

    A copy of the model goes to each GPU if it fits, and the questions are shared out; else the GPUs hold it between
    them. The figures do not depend on it. Those of a run are added to RUN/evaluations.jsonl.
    """
    settings = typed_settings({name: given.pop(name) for name in SETTINGS}, assignments)
    judging = {name: given.pop(name) for name in msgspec.structs.asdict(JudgeSettings())}
    judge = request_of(JudgeSettings, judging)
    asked = request_of(Asked, {**given, "targets": targets})
    out = Path(file_to_write(asked.out)) if asked.out is not None else None
    with _Progress() as progress:
        found = evaluate_all(asked, settings, judge, show=progress.show, say=lambda line: say(line, err=True))
    text = msgspec.json.format(msgspec.json.encode(comparison_of(found)), indent=1).decode() + "\n"
    if out is not None:
        write_out(out, text)
    if asked.json:
        say_json(text.rstrip("\n").encode())
    else:
        say("\n".join(evaluation_lines(found, width=terminal_width())))


class _Progress:
    """A line on standard error for the task that ranks are at."""

    def __init__(self) -> None:
        self._line: ProgressLine | None = None
        self._task, self._done, self._time = "", 0, 0.0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def show(self, events: Sequence[Event]) -> None:
        """Take in what the ranks said since."""
        for event in events:
            if event.kind == "scored":
                self._show(event)

    def _show(self, event: Event) -> None:
        self._time = event.time  # rates are the ranks' own, of whom several events may come at once
        if event.note != self._task or self._line is None:
            self._close()
            self._task, self._done, self._line = event.note, 0, self._line_of(event)
        if event.step > self._done:
            self._line.advance(event.step - self._done, event.note)
            self._done = event.step

    def _line_of(self, event: Event) -> ProgressLine:
        return ProgressLine(event.total_steps, "scored", clock=lambda: self._time)

    def _close(self) -> None:
        if self._line is not None:
            self._line.__exit__(None, None, None)
            self._line = None
