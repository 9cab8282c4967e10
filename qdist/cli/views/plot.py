"""A curve in a terminal: two by four dots of braille in each cell, or plain characters where there is no Unicode."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import groupby, pairwise
from operator import itemgetter

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille cell, by row and column."""
_EMPTY = 0x2800
_LABEL = 9


def _plain(bits: int) -> str:
    upper, lower = bits & 0x1B, bits & 0xE4
    return ":" if upper and lower else "'" if upper else "." if lower else " "


ASCII = {_EMPTY + bits: _plain(bits) for bits in range(256)} | dict(
    zip(map(ord, "━─│└●█░·…"), "=-|+o#.-~", strict=True)
)
"""Replacement of each special character on a terminal without Unicode."""


class Lines:
    """Lines of text, one below the other, never wrapped; in ASCII if the terminal has nothing better."""

    def __init__(self, lines: Sequence[Text]) -> None:
        self.lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            if options.ascii_only:
                plain = line.plain.translate(ASCII).encode("ascii", "replace").decode()
                line = Text(plain, spans=line.spans, style=line.style)
            line.no_wrap, line.overflow = True, "crop"
            yield line


def bar(share: float, width: int, style: str) -> Text:
    """A partly filled bar; full if the share is above 1."""
    filled = min(width, max(0, round(share * width)))
    return Text.assemble(("━" * filled, style), ("─" * (width - filled), "dim"))


def plot(
    title: str,
    steps: Sequence[int],
    values: Sequence[float],
    *,
    width: int,
    height: int,
    points: Sequence[tuple[int, float]] = (),
) -> list[Text]:
    """A curve of `height` lines, each `width` wide: title, curve with its bounds at the left, first and last step.

    What falls into one column of dots is drawn as its mean, and faintly from its lowest to its highest.
    points: (step, value) drawn as marks.
    """
    across, down = max(2, width - _LABEL - 1), max(1, height - 2)
    head = Text(title[:width].ljust(width), style="bold")
    columns = _columns(values, 2 * across)
    drawn = [value for column in columns if column for value in column]
    drawn += [value for _, value in points if math.isfinite(value)]
    if not drawn:
        blank = [Text(" " * width) for _ in range(height - 1)]
        blank[:1] = [Text("no numbers yet".ljust(width)[:width], style="dim")]
        return [head, *blank][:height]
    low, high = min(drawn), max(drawn)
    if high - low <= 1e-9 * abs(high):  # rounding, not a slope
        low = high
    grid = _dots(columns, across, down, low, high)
    marks = {_cell(point, steps, across, down, low, high) for point in points if math.isfinite(point[1])}
    lines = [head]
    labels = {_height(low, 4 * down, low, high) // 4: _label(low)} | ({0: _label(high)} if high > low else {})
    for row in range(down):
        label = labels.get(row, "")
        line = Text(f"{label:>{_LABEL}}│", style="dim")
        cells = [("●", "not dim yellow") if (row, at) in marks else _drawn(*grid[row][at]) for at in range(across)]
        for style, run in groupby(cells, key=itemgetter(1)):  # a style a cell costs thrice the time
            line.append("".join(char for char, _ in run), style=style)
        lines.append(line)
    first, last = (f"{steps[0]:,}", f"{steps[-1]:,}") if len(steps) else ("", "")
    foot = f"{'':>{_LABEL}}└{first}{last:>{max(0, across - len(first))}}"
    return [*lines, Text(foot[:width].ljust(width), style="dim")][:height]


def _columns(values: Sequence[float], count: int) -> list[tuple[float, float, float] | None]:
    """(mean, lowest, highest) of the finite values in each column; None if there are none."""
    edges = [position * len(values) // count for position in range(count + 1)]
    if len(values) < count:
        # Fewer steps than dots: each stands where it is, with what was before drawn on to it.
        edges = [*range(len(values) + 1)]
    found: list[tuple[float, float, float] | None] = []
    for start, end in pairwise(edges):
        part = values[start:end]
        mean = sum(part) / len(part)
        if not math.isfinite(mean):
            part = [value for value in part if math.isfinite(value)]
            mean = sum(part) / len(part) if part else math.nan
        found.append((mean, min(part), max(part)) if part else None)
    if 0 < len(found) < count:
        found = [found[position * len(found) // count] for position in range(count)]
    return found


def _dots(
    columns: Sequence[tuple[float, float, float] | None], across: int, down: int, low: float, high: float
) -> list[list[tuple[int, int]]]:
    """Braille bits of each cell: of the curve, and of the faint band around it."""
    curve = [[0] * across for _ in range(down)]
    band = [[0] * across for _ in range(down)]
    before: int | None = None
    for x, column in enumerate(columns):
        if column is None:
            before = None
            continue
        y, top, bottom = (_height(value, 4 * down, low, high) for value in (column[0], column[2], column[1]))
        for dot in range(top, bottom + 1):
            if (dot + x) % 2 == 0:
                band[dot // 4][x // 2] |= _DOTS[dot % 4][x % 2]
        start = y if before is None else before + (1 if y > before else -1 if y < before else 0)
        for dot in range(min(start, y), max(start, y) + 1):
            curve[dot // 4][x // 2] |= _DOTS[dot % 4][x % 2]
        before = y
    return [list(zip(*rows, strict=True)) for rows in zip(curve, band, strict=True)]


def _height(value: float, dots: int, low: float, high: float) -> int:
    """Rows of dots from the top; the middle row if all values are equal."""
    return dots // 2 if high <= low else round((high - value) / (high - low) * (dots - 1))


def _cell(
    point: tuple[int, float], steps: Sequence[int], across: int, down: int, low: float, high: float
) -> tuple[int, int]:
    column = bisect_left(steps, point[0]) * across // max(1, len(steps))
    return _height(point[1], 4 * down, low, high) // 4, min(across - 1, column)


def _drawn(curve: int, faint: int) -> tuple[str, str]:
    return chr(_EMPTY + (curve or faint)), "not dim cyan" if curve else "dim"


def _label(value: float) -> str:
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"
