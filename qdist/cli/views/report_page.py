"""A report as one HTML page that needs nothing else: no network, no file. Every text from outside is escaped here."""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template

import msgspec

from qdist.core.evaluation.results import Evaluation
from qdist.core.telemetry.evaluations import evaluation_tables
from qdist.core.telemetry.memory_report import MEANING, PARTS, REST, TOTAL, WORKING, MemoryParts, shown_error
from qdist.core.telemetry.report import Report, SampleAnswer, differences, metrics_beside
from qdist.core.telemetry.report_sections import Rows, Table, took
from qdist.core.text import format_bytes

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
    """Labels and their values; empty without rows."""
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
    """What the figures are, and the sign of errors."""
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


def _key(memory: Sequence[MemoryParts]) -> str:
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


def _memory_table(own: MemoryParts) -> str:
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
    """Where a step's time goes; a sentence if the run did not record it."""
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


def answers(found: Sequence[SampleAnswer]) -> str:
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


def _same(own: SampleAnswer) -> str:
    return ' <span class="same">as expected</span>' if own.after.strip() == own.expected.strip() else ""


def _cells(row: Sequence[str]) -> str:
    first, *others = row
    return f'<th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in others)


_STATES = {"finished": "good", "running": "busy", "failed": "bad", "killed": "bad"}
_NO_SCRIPTS = '<noscript><p class="note">Charts need scripts. Their figures are in the table below.</p></noscript>'


def page(report: Report, plan_lines: Sequence[str]) -> str:
    """The page of one run. plan_lines: the plan in words."""
    return _document(
        title=f"{report.name}: qdist report",
        body="\n".join([_header(report), *_sections([report], [plan_lines])]),
        reports=[report],
    )


def compare_page(reports: Sequence[Report], plan_lines: Sequence[Sequence[str]]) -> str:
    """The page of two runs, A and B, each with its plan in words."""
    named = [msgspec.structs.replace(own, name=f"{tag} {own.name}") for tag, own in zip("AB", reports, strict=True)]
    a, b = named
    difference = differences(a, b)
    both = tasks([*a.evaluations, *b.evaluations]) if a.evaluations and b.evaluations else ""
    comparison = _section(
        "comparison",
        "Comparison",
        f'<div class="tables"><div><h3>What came of it</h3>{table(metrics_beside(a, b), figures=True)}</div>',
        f"<div><h3>What differs</h3>{_differing(difference)}</div></div>",
        f"<h3>What tasks found</h3>{both}" if both else "",
    )
    headers = f'<div class="beside">{"".join(map(_header, named))}</div>'
    return _document(
        title=f"{reports[0].name} and {reports[1].name}: qdist report",
        body="\n".join([headers, comparison, *_sections(named, plan_lines)]),
        reports=named,
    )


def _differing(difference: Table) -> str:
    return table(difference) if difference.rows else "<p>Settings, decisions and versions are the same.</p>"


def _document(*, title: str, body: str, reports: Sequence[Report]) -> str:
    scripts = [_asset("uPlot.iife.min.js"), _asset("report.js")]
    return Template(_asset("report.html")).substitute(
        title=escape(title),
        # Only these two scripts may run, whatever a model's answer holds.
        hashes=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        style=_asset("uPlot.min.css") + _asset("report.css"),
        body=body,
        data=_script_json([{"name": own.name, "charts": own.charts, "marks": own.marks} for own in reports]),
        uplot=scripts[0],
        script=scripts[1],
    )


def _asset(name: str) -> str:
    return (resources.files("qdist.cli") / "assets" / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _script_json(content: object) -> str:
    """JSON that cannot end the script element which holds it."""
    return msgspec.json.encode(content).decode().replace("<", "\\u003c")


def _header(report: Report) -> str:
    error = ""
    if report.message:
        try_ = f"<p><strong>Try:</strong> {escape(report.try_)}</p>" if report.try_ else ""
        error = f'<div class="error"><pre>{escape(report.message)}</pre>{try_}</div>'
    return (
        f'<header><h1>{escape(report.name)} <span class="state {_STATES.get(report.state, "")}">'
        f"{escape(report.state)}</span></h1><p>{escape(report.headline)}</p>{error}{rows_table(report.summary)}</header>"
    )


def _sections(reports: Sequence[Report], plans: Sequence[Sequence[str]]) -> Iterator[str]:
    yield _each(reports, "warnings", "Warnings", [_warnings(own) for own in reports])
    yield _section("curves", "Curves", _charts(reports), *(_numbers(own, len(reports) > 1) for own in reports))
    yield _each(reports, "memory", "Memory, predicted against measured", [memory(own) for own in reports])
    yield _each(reports, "inventory", "What was trained on", [rows_table(own.inventory) for own in reports])
    yield _each(reports, "time", "Where the time went", [_time(own) for own in reports])
    if any(own.generations.rows for own in reports):
        yield _each(reports, "nodes", "Nodes", [table(own.generations) for own in reports])
    yield _each(reports, "evaluation", "Evaluation", [_evaluation(own) for own in reports])
    yield _each(reports, "samples", "Samples", [answers(own.answers) for own in reports])
    yield _each(reports, "command", "How to run it again", [_command(own) for own in reports])
    lines = [f'<pre class="plan">{escape(chr(10).join(own))}</pre>' for own in plans]
    yield _each(reports, "plan", "Plan, and why not otherwise", lines)
    yield _each(reports, "settings", "Settings that differ from the defaults", [table(own.settings) for own in reports])
    yield _each(reports, "environment", "Environment", [_environment(own) for own in reports])


def _section(key: str, title: str, *parts: str) -> str:
    return f'<section id="{key}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def _each(reports: Sequence[Report], key: str, title: str, parts: Sequence[str]) -> str:
    """A section; for two runs, their parts side by side."""
    if len(parts) == 1:
        return _section(key, title, *parts)
    named = [f"<div><h3>{escape(own.name)}</h3>{part}</div>" for own, part in zip(reports, parts, strict=True)]
    return _section(key, title, f'<div class="beside">{"".join(named)}</div>')


def _warnings(report: Report) -> str:
    if not report.warnings:
        return '<p class="fine">None.</p>'
    return f'<ul class="warnings">{"".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)}</ul>'


def _charts(reports: Sequence[Report]) -> str:
    keys = {chart.key: chart.title for own in reports for chart in own.charts}
    if not keys:
        return "<p>No step was done yet.</p>"
    figures = [
        f'<figure data-chart="{escape(key)}"><figcaption>{escape(title)}</figcaption>'
        f'<div class="plot" role="img" aria-label="{escape(title)} over steps"></div></figure>'
        for key, title in keys.items()
    ]
    hint = (
        '<p class="note scripted">Drag over a chart to zoom all of them, double-click to see all steps again, click '
        "on a name to hide its curve. Ticks at the bottom are checkpoints, dashed lines resumes. Of a long run each "
        "curve shows the lowest and the highest value of every stretch.</p>"
    )
    return f'{_NO_SCRIPTS}<div class="charts">{"".join(figures)}</div>{hint}'


def _numbers(report: Report, named: bool) -> str:
    if not report.numbers.rows:
        return ""
    title = "The curves in figures" + (f": {report.name}" if named else "")
    return f"<details><summary>{escape(title)}</summary>{table(report.numbers, figures=True)}</details>"


def _time(report: Report) -> str:
    ranks = table(report.ranks, figures=True) if report.ranks.rows else ""
    return step_bar(report) + rows_table(report.pace) + ranks


def _evaluation(report: Report) -> str:
    losses = table(report.held_out, figures=True) if report.held_out.rows else ""
    return losses + tasks(report.evaluations) or "<p>Nothing was evaluated.</p>"


def tasks(evaluations: Sequence[Evaluation]) -> str:
    """What tasks found of models: side by side, their differences, subjects and notes; empty without any."""
    if not evaluations:
        return ""
    found = evaluation_tables(evaluations)
    differences = table(found.differences) if found.differences.rows else ""
    groups = "".join(
        f"<details><summary>{escape(task)}, in parts</summary>{table(content, figures=True)}</details>"
        for task, content in found.groups
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    return table(found.figures) + differences + groups + (f'<ul class="note">{notes}</ul>' if notes else "")


def _command(report: Report) -> str:
    if report.commands:
        typed = "\n".join(report.commands)
        found = f"<pre>{escape(typed)}</pre>"
    else:
        found = "<p>The run did not keep its command. Its recipe does the same:</p>"
        found += "<pre>qdist launch recipe.toml --run NEW_RUN</pre>"
    recipe = f"<details><summary>recipe.toml</summary><pre>{escape(report.recipe)}</pre></details>"
    return found + (recipe if report.recipe else "")


def _environment(report: Report) -> str:
    return rows_table(report.machine) + rows_table(report.versions) or "<p>The run did not keep it.</p>"
