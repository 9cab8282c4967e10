"""What an evaluation found, as tables for the terminal."""

from collections.abc import Iterator, Sequence

from qdist.core.evaluation.results import Evaluation, Figure, TaskResult


def evaluation_lines(found: Sequence[Evaluation]) -> Iterator[str]:
    """A table a task: a row a figure and subject, a column a model; settings and notes below."""
    for names in dict.fromkeys(tuple(result.task for result in own.results) for own in found):
        alike = [own for own in found if tuple(result.task for result in own.results) == names]
        for number, _ in enumerate(names):
            if number:
                yield ""
            yield from _table([own.results[number] for own in alike], [_title(own, alike) for own in alike])
    for where in dict.fromkeys(own.where for own in found):
        yield f"\n{where}"


def _title(own: Evaluation, alike: Sequence[Evaluation]) -> str:
    """'adapter', or 'runs/2 adapter' where there are several targets."""
    several = len({each.target for each in alike}) > 1
    name = own.what if own.what != "model" else own.target
    return f"{own.target} {name}" if several and own.what != "model" else name


def _table(results: Sequence[TaskResult], titles: Sequence[str]) -> Iterator[str]:
    rows = [[results[0].task, *titles]]
    for number, figure in enumerate(results[0].figures):
        rows.append([figure.name, *(_shown(result.figures[number]) for result in results)])
    rows += [[f"  {name}", *(_shown(result.groups[name]) for result in results)] for name in results[0].groups]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        yield "  ".join(
            (f"{name:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)))
        )
    yield "  " + ", ".join(
        (f"of {results[0].figures[0].count:,}", *(f"{k} {v}" for k, v in results[0].settings.items()))
    )
    for note in results[0].notes:
        yield f"  note: {note}"


def _shown(figure: Figure) -> str:
    """'0.3120', or '0.3120 (0.2832 to 0.3408)' with an interval."""
    value = f"{figure.value:.4f}"
    return value if figure.low is None or figure.high is None else f"{value} ({figure.low:.4f} to {figure.high:.4f})"
