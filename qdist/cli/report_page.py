"""A report as one HTML page that needs nothing else: no network, no file, and scripts for its charts alone."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from string import Template

import msgspec

from qdist.cli.report_parts import answers, memory, rows_table, step_bar, table
from qdist.core.comparison import differences, metrics_beside
from qdist.core.report import Report
from qdist.core.report_sections import Table

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
    comparison = _section(
        "comparison",
        "Comparison",
        f'<div class="tables"><div><h3>What came of it</h3>{table(metrics_beside(a, b), figures=True)}</div>',
        f"<div><h3>What differs</h3>{_differing(difference)}</div></div>",
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
    yield _each(reports, "time", "Where the time went", [_time(own) for own in reports])
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
    """A section; of two runs, each with its part beside the other's."""
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
        f'<figure data-chart="{key}"><figcaption>{escape(title)}</figcaption>'
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
    return table(report.held_out, figures=True) if report.held_out.rows else "<p>Nothing was evaluated.</p>"


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
