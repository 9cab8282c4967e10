"""Pieces of a report's page: tables, bars and samples as HTML. Every text from outside is escaped here."""

from collections.abc import Mapping, Sequence
from html import escape

from qdist.core.memory_parts import PARTS, REST, TOTAL, WORKING, Parts
from qdist.core.prediction import MEANING, shown_error
from qdist.core.report import Answer, Report
from qdist.core.report_sections import Rows, Table, took
from qdist.core.units import format_bytes

_KINDS = {name: f"part-{name}" for name in PARTS} | {WORKING: "part-working", REST: "part-rest"}
_STEP_KINDS = ("part-gathers", "part-weights", "part-rest", "part-optimizer")
_WORKED = ("activations", "logits", "gathers")


def table(content: Table, *, figures: bool = False) -> str:
    """figures: all columns but the first are numbers, and stand at the right."""
    if not content.rows:
        return '<p class="fine">None.</p>'
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in content.headers)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in content.rows)
    kind = ' class="figures"' if figures else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def rows_table(rows: Rows) -> str:
    """Labels and their values; nothing for no rows."""
    if not rows:
        return ""
    body = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in rows)
    return f'<dl class="rows">{body}</dl>'


def memory(report: Report) -> str:
    """Stacked bars, predicted over measured, and the same as a table."""
    most = max((max(own.predicted_bytes, own.measured_bytes) for own in report.memory), default=0)
    if not most:
        return "<p>Nothing was predicted or measured.</p>"
    bars = "".join(
        f'<div class="bars"><h4>{escape(own.label)}</h4>{_bar("predicted", own.predicted, most)}'
        f"{_bar('measured', own.measured, most)}</div>"
        for own in report.memory
    )
    tables = f'<div class="tables">{"".join(map(_memory_table, report.memory))}</div>'
    return f'{_key(report.memory)}{bars}<p class="note">{escape(_memory_note(report))}</p>{tables}'


def _memory_note(report: Report) -> str:
    """What the figures are, and which way round errors go."""
    if not any(own.measured for own in report.memory):
        return "Nothing was measured yet."
    return f"{_measured_how(report)} {MEANING.capitalize()}."


def _measured_how(report: Report) -> str:
    if report.state != "finished":
        return "Until the run is finished, the peak alone is known, not its parts."
    if report.on_cpu and not any(REST in own.measured for own in report.memory):
        return "Of a rank on CPUs the largest resident set alone was measured, not its parts."
    if report.on_cpu:
        return (
            "Of a rank on CPUs the largest resident set alone is measured: weights, adapter, gradients and optimizer "
            "are its tensors after the last step, and there is no telling activations from libraries in what is left."
        )
    return (
        "Weights, adapter, gradients and optimizer are measured after the last step; what the peak of torch's tensors "
        "exceeds them by is activations, logits and gathers, which cannot be told apart. Predicted gradients are what "
        "they add at the fullest moment. The context is CUDA, libraries and NCCL."
    )


def _key(memory: Sequence[Parts]) -> str:
    used = {name for own in memory for parts in (own.predicted, own.measured) for name, size in parts.items() if size}
    names = [name for name in (*PARTS, WORKING, REST, TOTAL, "all tensors") if name in used]
    return '<p class="key">' + "".join(f'<span><i class="{_kind(name)}"></i>{name}</span>' for name in names) + "</p>"


def _kind(name: str) -> str:
    return _KINDS.get(name, "part-total")


def _bar(label: str, parts: Mapping[str, int], most: int) -> str:
    if not parts:
        return f'<div class="bar"><b>{label}</b><span class="fine">not known</span></div>'
    total = format_bytes(sum(parts.values()))
    pieces = "".join(
        f'<i class="{_kind(name)}" style="width:{100 * size / most:.3f}%" title="{name}: {format_bytes(size)}"></i>'
        for name, size in parts.items()
        if size
    )
    return f'<div class="bar"><b>{label}</b><span class="track">{pieces}</span><em>{total}</em></div>'


def _memory_table(own: Parts) -> str:
    rows = [(name, size, own.measured.get(name)) for name, size in own.predicted.items() if name not in _WORKED]
    working = sum(own.predicted[name] for name in _WORKED)
    if REST in own.measured:
        context = own.predicted["context"]
        rows = [row for row in rows if row[0] != "context"]
        rows.append((f"{WORKING}, context", working + context, own.measured[REST]))
    else:
        rows.insert(-1, (WORKING, working, own.measured.get(WORKING)))
    cells = [
        (
            name,
            format_bytes(predicted),
            "-" if measured is None else format_bytes(measured),
            shown_error(predicted, measured),
        )
        for name, predicted, measured in rows
    ]
    total = own.measured_bytes or None
    cells.append((
        TOTAL, format_bytes(own.predicted_bytes), "-" if total is None else format_bytes(total),
        shown_error(own.predicted_bytes, total),
    ))  # fmt: skip
    content = Table(headers=(own.label, "predicted", "measured", "error"), rows=tuple(cells))
    return table(content, figures=True)


def step_bar(report: Report) -> str:
    """What a step's time goes to; a sentence where the run did not say."""
    if not report.step:
        return "<p>The ranks did not say what a step's time went to.</p>"
    pieces = "".join(
        f'<i class="{kind}" style="width:{100 * part.share:.3f}%" title="{part.name}: {part.time}"></i>'
        for kind, part in zip(_STEP_KINDS, report.step, strict=True)
    )
    whole = took(sum(part.milliseconds for part in report.step) / 1000)
    body = "".join(
        f'<tr><td><i class="{kind}"></i>{escape(part.name)}</td><td>{part.time}</td>'
        f"<td>{100 * part.share:.1f} %</td></tr>"
        for kind, part in zip(_STEP_KINDS, report.step, strict=True)
    )
    return (
        f'<div class="bars"><div class="bar"><b>a step</b><span class="track">{pieces}</span><em>{whole}</em>'
        '</div></div><div class="wide"><table class="figures"><thead><tr><th scope="col">mean of all steps, rank 0</th>'
        f'<th scope="col">time</th><th scope="col">share</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def answers(found: Sequence[Answer]) -> str:
    """Held-out questions and what the model said, before and after."""
    if not found:
        return "<p>No questions were asked: <code>--set train.answers=3</code> asks three.</p>"
    return "".join(
        f'<div class="answer"><h4>{escape(own.question)}</h4><dl>'
        + "".join(
            f'<dt>{label}</dt><dd class="{label}">{escape(text.strip()) or "(nothing)"}{mark}</dd>'
            for label, text, mark in (
                ("before", own.before, ""),
                ("after", own.after, _same(own)),
                ("expected", own.expected, ""),
            )
        )
        + "</dl></div>"
        for own in found
    )


def _same(own: Answer) -> str:
    return ' <span class="same">as expected</span>' if own.after.strip() == own.expected.strip() else ""


def _cells(row: Sequence[str]) -> str:
    first, *others = row
    return f'<th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in others)
