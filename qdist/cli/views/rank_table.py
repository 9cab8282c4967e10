"""A line per rank: current, peak and predicted memory, speed, and the state of its GPU."""

from rich.text import Text

from qdist.cli.views.plot import bar
from qdist.cli.views.text import cell
from qdist.core.telemetry.snapshot import Row, Snapshot, rows
from qdist.core.text import format_bytes, format_count, format_duration

_BAR_WIDTHS = (24, 16, 12, 8, 0)
_HEADINGS = ("peak of predicted", "of predicted")
"""Headings of the bars; the first one that fits is used."""
_BYTES = len("1,023 MiB")
_NODE = 12
"""Most cells of a node's name."""


def rank_table(snapshot: Snapshot, width: int, most: int, *, whole: bool = False) -> list[Text]:
    """A head and a line a GPU, or a CPU rank; of more than fit, the fullest.

    whole: with busy seconds, the age of the last beat, and what the rank is at, on a line of its own where it must.
    """
    found = rows(snapshot)
    head = "rank" if any(row.gpu not in (None, row.rank) for row in found) else "GPU" if found[0].card else "rank"
    shown = found
    own_line = whole and _fixed(found, head) + 2 + max(len(row.at) for row in found) > width
    most = (most + 1) // 2 if own_line else most
    if len(found) > most - 1:
        by_fullness = sorted(found, key=lambda row: -(row.peak_bytes or 0) / max(1, row.expected_bytes))
        kept = set(map(id, by_fullness[: max(1, most - 2)]))
        shown = [row for row in found if id(row) in kept]
    headings, cells = _cells(shown, head, whole=whole)
    widths = _widths(headings, cells)
    fixed = _total(widths)
    at = max(len(row.at) for row in shown) + 2 if whole and not own_line else 0
    length = next(length for length in _BAR_WIDTHS if fixed + at + (length + 7) * (length > 0) <= width or not length)
    lines = [_line(headings, widths, "dim")]
    if length:
        heading = next(words for words in _HEADINGS if len(words) <= length + len(" 100%"))
        lines[0].append(f"  {heading}", style="dim")
    for row, own in zip(shown, cells, strict=True):
        line = _line(own, widths, "")
        if length:
            line += Text("  ") + _fullness(row, length)
        if at:
            line.append(f"  {row.at}", style="dim")
        lines.append(line)
        if own_line:
            lines.append(Text(f"{'':>{widths[0]}}  {row.at}", style="dim"))
    if len(shown) < len(found):
        others = "a taller terminal shows the others" if whole else "tab shows the others"
        lines.append(Text(f"… the {len(shown)} fullest of {len(found)}; {others}", style="dim"))
    return lines


def _fixed(shown: list[Row], head: str) -> int:
    """Width in cells of a table with all columns, without bars."""
    return _total(_widths(*_cells(shown, head, whole=True)))


def _widths(headings: list[str], cells: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(headings, *cells, strict=True)]


def _total(widths: list[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _cells(shown: list[Row], head: str, *, whole: bool) -> tuple[list[str], list[list[str]]]:
    columns: dict[str, list[str]] = {} if not any(row.node for row in shown) else {"node": _nodes(shown)}
    columns |= {
        head: [_where(row) for row in shown],
        # As wide as they can get: a column that changes its width moves all others.
        f"{'memory':>{_BYTES}}": [_bytes(row.now_bytes) for row in shown],
        f"{'peak':>{_BYTES}}": [_bytes(row.peak_bytes) for row in shown],
        "predicted": [_bytes(row.expected_bytes) for row in shown],
        "tok/s": [_count(row.tokens_per_s) for row in shown],
    }
    if whole:
        columns["busy"] = ["-" if row.busy_s is None else f"{row.busy_s:.3g} s" for row in shown]
        columns["beat"] = ["-" if row.beat_s is None else f"{format_duration(row.beat_s)} ago" for row in shown]
    cards = [row.card for row in shown]
    if any(cards):
        columns["util"] = [
            f"{card.utilization:.0%}" if card and card.utilization is not None else "-" for card in cards
        ]
        columns["power"] = [
            f"{card.power_w:.0f}" + (f"/{card.power_limit_w:.0f} W" if card.power_limit_w else " W")
            if card and card.power_w is not None else "-"
            for card in cards
        ]  # fmt: skip
        columns["temp"] = [
            f"{card.temperature_c} C" if card and card.temperature_c is not None else "-" for card in cards
        ]
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def _fullness(row: Row, width: int) -> Text:
    """Bar of peak over predicted bytes; of current bytes while there is no peak."""
    held = row.peak_bytes or row.now_bytes
    if not held or not row.expected_bytes:
        return Text("─" * width + "     ", style="dim")
    share = held / row.expected_bytes
    style = "red" if share > 1.1 else "yellow" if share > 1 else "green"
    return bar(share, width, style) + Text(f" {share:>4.0%}" if share < 10 else " >10x", style=style)


def _nodes(shown: list[Row]) -> list[str]:
    """The name of each node beside its first row."""
    whole = [cell(row.node) for row in shown]
    names = [name if len(name) <= _NODE else f"{name[: _NODE - 1]}…" for name in whole]
    return [name if index == 0 or name != names[index - 1] else "" for index, name in enumerate(names)]


def _where(row: Row) -> str:
    return str(row.rank) if row.gpu in (None, row.rank) else f"{row.rank} GPU {row.gpu}"


def _line(cells: list[str], widths: list[int], style: str) -> Text:
    return Text("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)), style=style)


def _bytes(count: int | None) -> str:
    return "-" if count is None else format_bytes(count)


def _count(number: float | None) -> str:
    return "-" if number is None else format_count(number)
