"""Evaluations as tables for a person: models side by side, what they differ by, subjects, and what is to be noted."""

import re
from collections.abc import Iterator, Sequence

import msgspec

from qdist.core.evaluation.comparison import Column, Difference, columns_of, differences_of, incomparable
from qdist.core.evaluation.results import Evaluation, Figure, TaskResult
from qdist.core.telemetry.report_sections import Table, number

_NOTHING = 1e-9
"""What is less than this is shown as 0: sacrebleu smooths BLEU, which is then never 0."""


class EvaluationTables(msgspec.Struct, frozen=True, kw_only=True):
    """What a person reads of some evaluations. A table without rows has nothing to say."""

    figures: Table
    differences: Table
    groups: tuple[tuple[str, Table], ...]
    """By the task that they divide."""
    notes: tuple[str, ...]


def evaluation_tables(evaluations: Sequence[Evaluation]) -> EvaluationTables:
    """The latest result of each task and model, the base first."""
    columns = columns_of(evaluations)
    tasks = list(dict.fromkeys(result.task for column in columns for result in column.results))
    return EvaluationTables(
        figures=Table(
            headers=("task", "figure", *(column.name for column in columns)),
            rows=tuple(row for task in tasks for row in _figure_rows(task, columns)),
        ),
        differences=Table(
            headers=("task", "model", "difference", "95 % interval", "by chance", ""),
            rows=tuple(map(_difference_row, differences_of(columns))),
        ),
        groups=tuple((shortened(task), table) for task in tasks if (table := _groups_table(task, columns)).rows),
        notes=tuple(dict.fromkeys((*_notes(columns), *map(shortened, incomparable(columns))))),
    )


def shortened(text: str) -> str:
    """A task's name with files named without their folders."""
    return re.sub(r"(?<=[:,])[^,:\s]*/(?=[^/,\s])", "", text)


def _figure_rows(task: str, columns: Sequence[Column]) -> Iterator[tuple[str, ...]]:
    found = [_result_of(task, column) for column in columns]
    names = dict.fromkeys(figure.name for result in found if result for figure in result.figures)
    for place, name in enumerate(names):
        figures = (
            next((own for own in result.figures if own.name == name), None) if result else None for result in found
        )
        yield (shortened(task) if place == 0 else "", name, *map(in_words, figures))


def _result_of(task: str, column: Column) -> TaskResult | None:
    return next((result for result in column.results if result.task == task), None)


def in_words(figure: Figure | None) -> str:
    """'0.3124 (0.291 to 0.333)', or '-' for none."""
    if figure is None:
        return "-"
    value = number(0.0 if abs(figure.value) < _NOTHING else figure.value)
    if figure.low is None or figure.high is None:
        return value
    return f"{value} ({_end(figure.low)} to {_end(figure.high)})"


def _end(value: float) -> str:
    """An end of an interval, to three digits or to the unit."""
    return number(float(f"{value:.3g}") if abs(value) < 1000 else value)


def _difference_row(own: Difference) -> tuple[str, ...]:
    ends = f"{own.low:+.3g} to {own.high:+.3g}"
    pair = f"{own.model} against {own.against}"
    chance = "below 0.001" if own.chance < 0.001 else f"{own.chance:.2g}"
    return shortened(own.task), pair, f"{own.value:+.3g}", ends, chance, own.word


def _groups_table(task: str, columns: Sequence[Column]) -> Table:
    """The first figure of each subject, with how many items it is of."""
    found = [(column.name, result) for column in columns if (result := _result_of(task, column)) and result.groups]
    names = dict.fromkeys(name for _, result in found for name in result.groups)
    counts = {name: figure.count for _, result in found for name, figure in result.groups.items()}
    return Table(
        headers=("", "of", *(name for name, _ in found)),
        rows=tuple(
            (name, f"{counts[name]:,}", *(in_words(result.groups.get(name)) for _, result in found)) for name in names
        ),
    )


def _notes(columns: Sequence[Column]) -> Iterator[str]:
    for column in columns:
        for result in column.results:
            if result.settings:
                stated = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result.settings.items())
                yield f"{shortened(result.task)}: {stated}"
            of_whom = f", {column.name}" if columns[1:] else ""
            for note in result.notes:
                yield f"{shortened(result.task)}{of_whom}: {note}"
