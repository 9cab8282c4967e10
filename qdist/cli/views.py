"""What a person sees of a run: plain data to rich renderables, and one plain line an event where no terminal is."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from qdist.core.events import Event
from qdist.core.fold import Fold
from qdist.core.units import format_bytes, format_count, format_duration

_MOST_ROWS = 8
"""More ranks than this are shown as the three that use the least, median and most of their prediction."""


_SLOW_GB_S = 0.1
"""What is read slower is told in MB/s; below as many of those, pages lay in memory and no rate says anything."""


class Sparkline:
    """A row of characters whose heights are the values; ASCII where the terminal has nothing better."""

    def __init__(self, values: Sequence[float], width: int) -> None:
        self.values = _resample([value for value in values if math.isfinite(value)], width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        levels = "_.-=^" if options.ascii_only else "▁▂▃▄▅▆▇█"
        low, high = min(self.values, default=0.0), max(self.values, default=0.0)
        scale = (len(levels) - 1) / (high - low) if high > low else 0.0
        yield Text("".join(levels[round((value - low) * scale)] for value in self.values), style="cyan", end="")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(len(self.values), len(self.values))


def _resample(values: Sequence[float], width: int) -> list[float]:
    """At most `width` values, each the mean of its share of the series."""
    if len(values) <= width:
        return list(values)
    edges = [position * len(values) // width for position in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def live_view(state: Fold, header: str, expected_bytes: Sequence[int], width: int) -> RenderableType:
    """A whole run in a few lines.

    header: model, method, ranks and devices.
    expected_bytes: predicted peak of each rank; () where nothing was predicted.
    """
    peaks = {rank: own.memory_bytes for rank, own in state.ranks.items() if own.memory_bytes}
    return Group(
        Text(header, style="bold", no_wrap=True, overflow="crop"),
        _progress(state),
        *_losses(state, width),
        Text(_pace(state), no_wrap=True, overflow="crop"),
        _memory(peaks, expected_bytes, width),
    )


def _progress(state: Fold) -> RenderableType:
    done = f"step {state.step}/{state.total_steps or '?'}"
    row = Table.grid(Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True), padding=(0, 1), expand=True)
    row.add_row(done, ProgressBar(total=max(1, state.total_steps), completed=state.step), _remaining(state))
    return row


def _remaining(state: Fold) -> str:
    if state.finished:
        return "finished"
    return "starting" if state.seconds_left is None else f"{format_duration(state.seconds_left)} left"


def _losses(state: Fold, width: int) -> Iterator[RenderableType]:
    if state.loss is not None and state.smoothed_loss is not None:
        label = Text(f"loss {state.loss:.3f}  smoothed {state.smoothed_loss:.3f}")
        row = Table.grid(Column(no_wrap=True), Column(no_wrap=True), padding=(0, 2))
        row.add_row(label, Sparkline(state.columns.loss, max(8, min(48, width - label.cell_len - 4))))
        yield row
    elif state.loss is not None:
        yield Text(f"loss {state.loss:.3f}: no step of late had a loss that is a number", style="red")
    if state.held_out:
        (first_step, first), (last_step, last) = state.held_out[0], state.held_out[-1]
        then = f" to {last:.3f} (step {last_step})" if last_step != first_step else ""
        yield Text(f"held-out {first:.3f} (step {first_step}){then}")


def _pace(state: Fold) -> str:
    parts = [
        f"{format_count(state.tokens_per_s)} tok/s" if state.tokens_per_s is not None else "",
        f"lr {state.learning_rate:.1e}" if state.learning_rate is not None else "",
        f"gradient {state.gradient_norm:.2f}" if state.gradient_norm is not None else "",
        f"{len(state.skipped)} skipped" if state.skipped else "",
    ]
    return "  ".join(part for part in parts if part)


def _memory(measured: dict[int, int], expected: Sequence[int], width: int) -> RenderableType:
    """A row a rank: peak measured, peak predicted, and the first as a part of the second."""
    ranks = range(len(expected)) if expected else sorted(measured)
    table = Table(
        Column(f"rank of {len(ranks)}" if len(ranks) > _MOST_ROWS else "rank", justify="right", no_wrap=True),
        Column("peak memory", justify="right", no_wrap=True),
        Column("predicted", justify="right", no_wrap=True),
        Column("", width=max(4, min(30, width - 50))),
        Column("", justify="right", no_wrap=True),
        box=None,
        padding=(0, 1),
        header_style="dim",
    )
    for label, rank in _shown(ranks, measured, expected):
        table.add_row(label, *_memory_cells(measured.get(rank), expected[rank] if expected else None))
    return table


def _shown(ranks: Sequence[int], measured: dict[int, int], expected: Sequence[int]) -> list[tuple[str, int]]:
    """Label and rank of each row."""
    if len(ranks) <= _MOST_ROWS:
        return [(str(rank), rank) for rank in ranks]

    def fullness(rank: int) -> float:
        return measured.get(rank, 0) / (expected[rank] if expected and expected[rank] else 1)

    ordered = sorted(ranks, key=fullness)
    chosen = (("least", ordered[0]), ("median", ordered[len(ordered) // 2]), ("most", ordered[-1]))
    return [(f"{rank} ({what})", rank) for what, rank in chosen]


def _memory_cells(measured: int | None, expected: int | None) -> tuple[RenderableType, ...]:
    have = "-" if measured is None else format_bytes(measured)
    if not expected:
        return have, "-", "", ""
    if measured is None:
        return have, format_bytes(expected), "", ""
    share = measured / expected
    style = "red" if share > 1.1 else "yellow" if share > 1 else "green"
    bar = ProgressBar(total=1.0, completed=min(1.0, share), complete_style=style, finished_style=style)
    return have, format_bytes(expected), bar, Text(f"{share:.0%}{' over' if share > 1 else ''}", style=style)


def plain_line(event: Event) -> str:
    """An event as a line of a log: 'step 12/60  loss 1.234  lr 2.0e-04  812 tok/s  rank0 1.9 GiB  3 min 20 s left'."""
    parts = [_plain_head(event)]
    if event.loss is not None:
        parts.append(f"loss {event.loss:.3f}")
    if event.held_out_loss is not None:
        parts.append(f"held-out {event.held_out_loss:.3f}")
    if event.learning_rate is not None:
        parts.append(f"lr {event.learning_rate:.1e}")
    if event.tokens and event.seconds > 0:
        parts.append(f"{format_count(event.tokens / event.seconds)} tok/s")
    if event.kind == "load":
        parts.append(loading(event.seconds, event.read_bytes))
    if event.memory_bytes:
        parts.append(f"rank{event.rank} {format_bytes(event.memory_bytes)}")
    if event.kind == "step" and event.seconds > 0 and event.total_steps > event.step:
        parts.append(f"{format_duration((event.total_steps - event.step) * event.seconds)} left")
    if event.skipped:
        parts.append("update skipped: the gradients are not numbers")
    return printable("  ".join((*parts, event.note) if event.note else parts)).replace("\n", " ")


def loading(seconds: float, read_bytes: int) -> str:
    """'12 s, 3.6 GiB read at 0.3 GB/s'; where nothing came from a disk, the seconds alone."""
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
        "step": where,
        "eval": where,
        "verify": f"{where}  backbone verified",
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
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def answers(rows: Sequence[tuple[str, str, str, str]]) -> RenderableType:
    """Questions with the answers before and after training and the one in the data.

    rows: (question, before, after, expected). Answers are a model's words, so nothing in them is markup.
    """
    return Group(*(part for row in rows for part in _answer(*row)))


def _answer(question: str, before: str, after: str, expected: str) -> Iterator[RenderableType]:
    yield Text(printable(question), style="bold")
    table = Table.grid(Column(no_wrap=True, style="dim"), Column(), padding=(0, 2, 0, 0))
    for label, text in (("  before", before), ("  after", after), ("  expected", expected)):
        table.add_row(label, Text(printable(text) or "(nothing)"))
    yield table
    yield Text("")


def printable(text: str) -> str:
    """Text that cannot move the cursor or recolour the terminal: a model may say anything."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text).strip()
