"""Models side by side, as lines of text: their figures, what they differ by, subjects and notes."""

from collections.abc import Iterator, Sequence

from qdist.cli.views.text import cell
from qdist.core.evaluation.results import Evaluation
from qdist.core.telemetry.evaluations import evaluation_tables
from qdist.core.telemetry.report_sections import Table

_WORDS = ("task", "figure", "model", "")
"""Headers of columns that stand at the left."""


def evaluation_lines(evaluations: Sequence[Evaluation], *, groups: bool = True) -> list[str]:
    """The latest result of each task and model; empty without evaluations.

    groups: subjects, languages or files too.
    """
    if not evaluations:
        return []
    tables = evaluation_tables(evaluations)
    lines = [*_aligned(tables.figures)]
    if tables.differences.rows:
        lines += ["", *_aligned(tables.differences)]
    for task, table in tables.groups if groups else ():
        lines += ["", cell(task), *_aligned(table)]
    return lines + [""] * bool(tables.notes) + [f"note: {cell(note)}" for note in tables.notes]


def _aligned(table: Table) -> Iterator[str]:
    """A table's lines, words at the left and numbers at the right of their columns."""
    rows = [tuple(map(cell, row)) for row in (table.headers, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            text.ljust(width) if header in _WORDS else text.rjust(width)
            for text, width, header in zip(row, widths, table.headers, strict=True)
        ).rstrip()
