"""The routes of the page: its files, and the run that it shows the curves of."""

import os
import sys
import webbrowser
from collections.abc import Callable
from importlib import resources
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from qdist.core.errors import QdistError
from qdist.core.telemetry.curves import Chart
from qdist.core.telemetry.report import report_of
from qdist.core.telemetry.report_sections import Rows, Table
from qdist.host.run.reporting import read_found
from qdist.host.run.rundir import RunDir
from qdist.host.terminal import say

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""What browsers are told of each file: whatever a model says, nothing but the page's own files is run or fetched."""


class RunView(msgspec.Struct, frozen=True, kw_only=True):
    """What the page shows of a run."""

    name: str
    state: str
    headline: str
    summary: Rows
    charts: tuple[Chart, ...]
    numbers: Table
    """Some steps of the curves in figures."""
    questions: tuple[str, ...]
    """Held-out questions that were asked before and after training."""


def announce_page(address: str, *, opens: bool) -> None:
    """Say where the page is, and open it in a browser if that is wanted and this machine has a screen."""
    say(f"the page is at {address}/")
    if opens and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        webbrowser.open(f"{address}/")


def page_routes(run: RunDir | None) -> list[Route]:
    """Routes of `/`, `/page/NAME` and `/run/report`. run: None if a plain model answers, which has no curves."""
    index, *others = sorted(_page_files(), key=lambda each: each[0] != "index.html")
    return [
        Route("/", _file_endpoint(*index)),
        *(Route(f"/page/{name}", _file_endpoint(name, content)) for name, content in others),
        Route("/run/report", _report_endpoint(run)),
    ]


def view_of(run: RunDir) -> RunView:
    """Read what there is to show of a run. Raises RunError if one of its files is broken."""
    report = report_of(read_found(run, run.path.resolve().name))
    return RunView(
        name=report.name,
        state=report.state,
        headline=report.headline,
        summary=report.summary,
        charts=report.charts,
        numbers=report.numbers,
        questions=tuple(answer.question for answer in report.answers),
    )


def _page_files() -> list[tuple[str, bytes]]:
    """Name and content of every file of the page."""
    folder = resources.files("qdist.runtime.serve") / "page"
    return [(each.name, each.read_bytes()) for each in folder.iterdir() if each.is_file()]


def _file_endpoint(name: str, content: bytes) -> Callable[[Request], Any]:
    kind = _KINDS[name[name.rindex(".") :]]

    async def send_file(request: Request) -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return send_file


def _report_endpoint(run: RunDir | None) -> Callable[[Request], Any]:
    def send_report(request: Request) -> Response:  # starlette calls it on a thread: a long run takes a while to read
        if run is None:
            return _json({"error": {"message": "a plain model has no curves"}}, status=404)
        try:
            return _json(view_of(run))
        except QdistError as error:
            return _json({"error": {"message": error.message, "try": error.try_}}, status=500)

    return send_report


def _json(content: object, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")
