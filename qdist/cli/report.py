"""`qdist report`: a run, or two beside each other, as one HTML page."""

from pathlib import Path

import click

from qdist.cli.views.evaluation import evaluation_lines
from qdist.cli.views.plan import plan_lines
from qdist.cli.views.report_page import compare_page, page
from qdist.cli.views.text import terminal_width
from qdist.core.errors import SpecError
from qdist.core.telemetry.report import Report, report_of
from qdist.core.text import command, format_bytes
from qdist.host.files import write_out
from qdist.host.run.reporting import read_found
from qdist.host.run.rundir import RunDir
from qdist.host.terminal import say


@click.command()
@click.argument("runs", metavar="RUN [OTHER]", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The page; RUN/report.html by default.")
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write what RUN did as one HTML page that needs no network; with OTHER, the two compared.

    What `qdist evaluate` found of them is printed too.
    """
    if len(runs) > 2:
        raise SpecError(f"a report is of one run or compares two, not {len(runs)}", try_=command("report", *runs[:2]))
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    found = [read_found(RunDir(run), name) for run, name in zip(runs, names, strict=True)]
    reports = [report_of(own) for own in found]
    plans = [plan_lines(own.seen.plan) for own in found]
    text = page(reports[0], plans[0]) if len(runs) == 1 else compare_page(reports, plans)
    for line in evaluation_lines(
        [one for own in found for one in own.evaluations], groups=False, width=terminal_width()
    ):
        say(line)
    path = out or runs[0] / _default_name(reports)
    write_out(path, text)
    say(f"{path}: {format_bytes(len(text.encode()))}")


def _default_name(reports: list[Report]) -> str:
    return "report.html" if len(reports) == 1 else "comparison.html"
