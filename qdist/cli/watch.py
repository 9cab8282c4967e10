"""Shows a run while it runs: a live view on a terminal, a plain line a step elsewhere; and its ending."""

import sys
from types import TracebackType

import click
from rich.console import Console, RenderableType
from rich.live import Live

from qdist.cli.outcome import outcome_rows, start_line
from qdist.cli.views import answers, comparison, live_view, plain_line
from qdist.core import demo
from qdist.core.events import Event
from qdist.core.fold import Fold
from qdist.core.plan import Plan
from qdist.core.units import format_bytes, format_count
from qdist.host.rundir import RunDir


class Watch:
    """A context in which events are shown as they come."""

    def __init__(self, plan: Plan, *, width: int) -> None:
        self._expected = tuple(rank.expected[0].total for rank in plan.ranks)
        self._header = header_of(plan)
        self._state = Fold(total_steps=plan.steps)
        self._width = width
        self._live = Live(self._view(), refresh_per_second=4, transient=False) if sys.stdout.isatty() else None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def recall(self, events: list[Event]) -> None:
        """Take note of what was said before the run was resumed, without saying it again."""
        self._state.add(events)

    def show(self, events: list[Event]) -> None:
        """Take note of what the ranks said."""
        self._state.add(events)
        if self._live:
            # Not before: its thread must not be there when the launcher forks.
            self._live.start()
            self._live.update(self._view())
            return
        for event in events:
            if event.rank == 0:
                click.echo(plain_line(event))

    def say(self, text: str) -> None:
        """A line for the user, above the live view."""
        if self._live:
            self._live.console.print(text, markup=False)
        else:
            click.echo(text)

    def _view(self) -> RenderableType:
        return live_view(self._state, self._header, self._expected, self._width)


def header_of(plan: Plan) -> str:
    """Model, method and ranks in one line."""
    kind = f"{plan.world_size} {'GPU' if plan.device == 'cuda' else 'CPU'} rank{'s' if plan.world_size > 1 else ''}"
    return f"{plan.spec.model}  {plan.spec.bits}-bit {plan.spec.method}  {kind}"


def ending(run: RunDir, plan: Plan) -> None:
    """Held-out loss and answers before and after, memory and speed predicted and measured, and what to do next."""
    result = run.result() or {}
    console = Console()
    rows = []
    if len(result.get("held_out", [])) > 1:
        (_, before), (_, after) = result["held_out"][0], result["held_out"][-1]
        rows.append(("held-out loss", f"{before:.3f}", f"{after:.3f}"))
    if rows:
        console.print()
        console.print(comparison(rows, ("", "before", "after")))
    console.print()
    console.print(comparison(outcome_rows(plan, result), ("", "predicted", "measured", "error")))
    if started := start_line(result):
        click.echo(started)
    if result.get("answers"):
        console.print()
        console.print(
            answers([(row["question"], row["before"], row["after"], row["expected"]) for row in result["answers"]])
        )
    measured = result["tokens_per_s"]["measured"]
    speed = f", {format_count(measured)} tok/s" if measured else ""
    click.echo(
        f"\nadapter  {run.adapter}: {format_count(result['adapter_parameters'])} parameters, "
        f"{format_bytes(result['adapter_bytes'])}{speed}"
    )
    system = f' --system "{demo.SYSTEM}"' if plan.spec.data == demo.NAME else ""
    if plan.source.tokenizer:
        click.echo(f"chat     qdist chat {run.path}{system}")
    click.echo(f"merge    qdist merge {run.path} --out {run.path}/merged")
