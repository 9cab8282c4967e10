"""Text about a run for the user: an event as a line, values and answers side by side."""

import shutil
import sys
from collections.abc import Iterator, Sequence

import click
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from qdist.core.telemetry.events import Event
from qdist.core.text import format_bytes, format_count, format_duration, printable

_SLOW_GB_S = 0.1
"""What is read slower is told in MB/s; below as many of those, pages lay in memory and no rate says anything."""


def terminal_width() -> int | None:
    """Cells of a line of standard output; None where that is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def plain_lines(event: Event, *, left_s: float | None = None) -> Iterator[str]:
    """An event as lines of a log: those of an inventory as they are, of any other one `plain_line`."""
    if event.kind == "inventory":
        yield from map(cell, event.note.splitlines())
    else:
        yield plain_line(event, left_s=left_s)


def plain_line(event: Event, *, left_s: float | None = None) -> str:
    """An event as a line of a log: 'step 12/60  loss 1.234  lr 2.0e-04  812 tok/s  rank0 1.9 GiB  3 min 20 s left'.

    left_s: until the last step, as the run so far tells it; one step alone tells nothing.
    """
    parts = [_plain_head(event)]
    if event.loss is not None:
        parts.append(f"loss {event.loss:.3f}")
    if event.held_out_loss is not None:
        parts.append(f"held-out {event.held_out_loss:.3f}")
    if event.figure is not None:
        parts.append(f"{event.task} {event.figure:.4g}")
    if event.learning_rate is not None:
        parts.append(f"lr {event.learning_rate:.1e}")
    if event.tokens and event.seconds > 0:
        parts.append(f"{format_count(event.tokens / event.seconds)} tok/s")
    if event.kind == "load":
        parts.append(loading(event.seconds, event.read_bytes))
    if event.memory_bytes and event.kind not in ("gradients", "starting"):
        parts.append(f"rank{event.rank} {format_bytes(event.memory_bytes)}")
    if event.kind == "step" and left_s:
        parts.append(f"{format_duration(left_s)} left")
    if event.skipped:
        parts.append("update skipped: the gradients are not numbers")
    return cell("  ".join((*parts, event.note) if event.note else parts)).replace("\n", " ")


def loading(seconds: float, read_bytes: int) -> str:
    """'12 s, 3.6 GiB read at 0.3 GB/s'; only the seconds if nothing was read from a disk."""
    if not read_bytes or seconds <= 0:
        return format_duration(seconds)
    rate, unit = read_bytes / seconds / 1e9, "GB/s"
    if rate < _SLOW_GB_S:
        rate, unit = 1000 * rate, "MB/s"
    pace = f" at {rate:.{0 if rate >= 10 else 1}f} {unit}" if rate >= _SLOW_GB_S else ""
    return f"{format_duration(seconds)}, {format_bytes(read_bytes)} read{pace}"


def _plain_head(event: Event) -> str:
    where = f"step {event.step}/{event.total_steps}" if event.total_steps else f"step {event.step}"
    words = {
        "load": "backbone loaded",
        "starting": "ready to train",
        "step": where,
        "eval": where,
        "verify": f"{where}  backbone verified",
        "gradients": f"{where}  gradients checked",
        "checkpoint": f"{where}  checkpoint written",
        "resume": f"resumed at {where}",
    }
    return words.get(event.kind, f"started at {where}" if event.kind == "start" else f"finished at {where}")


def comparison(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> RenderableType:
    """Values beside each other: each row is what was measured and its values, such as before and after."""
    table = Table(
        Column(headers[0]), *(Column(header, justify="right") for header in headers[1:]), box=None, padding=(0, 2, 0, 0)
    )
    for row in rows:
        table.add_row(*(Text(cell(value)) for value in row))
    return table


def answers(rows: Sequence[tuple[str, str, str, str]]) -> RenderableType:
    """Questions with the answers before and after training and the one in the data.

    rows: (question, before, after, expected). Answers are a model's words, so nothing in them is markup.
    """
    return Group(*(part for row in rows for part in _answer(*row)))


def _answer(question: str, before: str, after: str, expected: str) -> Iterator[RenderableType]:
    yield Text(cell(question), style="bold")
    table = Table.grid(Column(no_wrap=True, style="dim"), Column(), padding=(0, 2, 0, 0))
    for label, text in (("  before", before), ("  after", after), ("  expected", expected)):
        table.add_row(label, Text(cell(text) or "(nothing)"))
    yield table
    yield Text("")


def cell(text: str) -> str:
    """Text from outside, as shown in a table or a line of a view."""
    return printable(text).replace("\t", " ").strip()


def say_styled(text: str) -> None:
    """Print a text with colours, omitted for a pipe or with NO_COLOR."""
    click.echo(printable(text, colours=True))
