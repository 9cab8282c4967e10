"""Models side by side, as lines of text: their figures, what they differ by, subjects and notes."""

from collections.abc import Iterator, Sequence

from qdist.cli.views.text import cell
from qdist.core.evaluation.results import Evaluation
from qdist.core.telemetry.evaluations import evaluation_tables
from qdist.core.telemetry.report_sections import Table

_WORDS = ("task", "figure", "model", "")
"""Headers of columns that stand at the left."""


def evaluation_lines(evaluations: Sequence[Evaluation], *, groups: bool = True, width: int | None = None) -> list[str]:
    """The latest result of each task and model; empty without evaluations.

    groups: subjects, languages or files too. width: cells of a line, in which tables that are wider are stacked.
    """
    if not evaluations:
        return []
    tables = evaluation_tables(evaluations)
    lines = _fitted(tables.figures, width)
    if tables.differences.rows:
        lines += ["", *_fitted(tables.differences, width)]
    for task, table in tables.groups if groups else ():
        lines += ["", cell(task), *_fitted(table, width)]
    return lines + [""] * bool(tables.notes) + [f"note: {cell(note)}" for note in tables.notes]


def _fitted(table: Table, width: int | None) -> list[str]:
    lines = list(_aligned(table))
    return lines if width is None or all(len(line) <= width for line in lines) else list(_stacked(table))


def _stacked(table: Table) -> Iterator[str]:
    """A row's words on a line, and below it each of its numbers on one of its own."""
    lead = next((place for place, header in enumerate(table.headers) if header not in _WORDS), 0)
    names = max(map(len, table.headers[lead:]))
    for row in table.rows:
        yield "  ".join(filter(None, map(cell, row[:lead])))
        for header, text in zip(table.headers[lead:], row[lead:], strict=True):
            yield f"  {cell(header):{names}}  {cell(text)}".rstrip()


def _aligned(table: Table) -> Iterator[str]:
    """A table's lines, words at the left and numbers at the right of their columns."""
    rows = [tuple(map(cell, row)) for row in (table.headers, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            text.ljust(width) if header in _WORDS else text.rjust(width)
            for text, width, header in zip(row, widths, table.headers, strict=True)
        ).rstrip()
