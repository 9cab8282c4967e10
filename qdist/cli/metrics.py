"""`qdist metrics`: a run's figures for Prometheus, printed, written to a file or served."""

import contextlib
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click

from qdist.core.errors import MachineError, QdistError
from qdist.core.telemetry.history import RunHistory
from qdist.core.telemetry.prometheus import CONTENT_TYPE, exposition
from qdist.host.files import write_out
from qdist.host.run.nodes import nodes_now
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir
from qdist.host.run.state import state_of
from qdist.host.run.watchdog import read_pulses
from qdist.host.terminal import say

_SILENT_S = 10.0
"""Seconds after which an idle client is disconnected."""
_MOST_CONNECTIONS = 32


@click.command()
@click.argument("run")
@click.option("--out", type=click.Path(path_type=Path), help="Write to a file, which readers never see half of.")
@click.option("--serve", "port", type=click.IntRange(0, 65535), metavar="PORT", help="Serve until Ctrl-C.")
@click.option("--host", help="Address to serve on: 127.0.0.1 by default; 0.0.0.0 is every one.")
def metrics(run: str, out: Path | None, port: int | None, host: str | None) -> None:
    """Print RUN's figures in Prometheus' text format; --out for node_exporter, --serve to be scraped."""
    if out is not None and port is not None:
        raise click.UsageError("--out writes once and --serve goes on: give one of the two")
    if host is not None and port is None:
        raise click.UsageError("--host goes with --serve")
    source = Source(RunDir(run))
    text = source.text()
    if port is not None:
        _serve(source, host or "127.0.0.1", port)
    elif out is not None:
        write_out(out, text)
    else:
        say(text, end="")


class Source:
    """The figures of a run as they are now. Of its events, each call reads only those that are new; any thread may."""

    def __init__(self, run: RunDir) -> None:
        self._run, self._follower, self._fold = run, Follower(run.path), RunHistory()
        self._name, self._lock = str(run.path), threading.Lock()

    def text(self) -> str:
        """The figures in Prometheus' text format. Raises RunError if the run cannot be read."""
        with self._lock:
            plan = self._run.plan()  # a resumed run has another
            self._follower.fold_into(self._fold)
            self._fold.total_steps = plan.steps
            pulses, nodes = read_pulses(self._run), nodes_now(self._run)
            return exposition(self._name, plan, self._fold, pulses, state_of(self._run), nodes)


class _Server(ThreadingHTTPServer):
    """Serves any client; above the connection limit, the connection open for longest is closed."""

    daemon_threads = True

    def __init__(self, *given: Any) -> None:
        self._open: dict[Any, None] = {}
        self._guard = threading.Lock()
        super().__init__(*given)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self._open[request] = None
            oldest = next(iter(self._open)) if len(self._open) > _MOST_CONNECTIONS else None
            self._open.pop(oldest, None)
        if oldest is not None:
            with contextlib.suppress(OSError):  # its own thread closes it
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that disconnects."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def server(source: Source, host: str, port: int) -> ThreadingHTTPServer:
    """An HTTP server of /metrics, bound but not started. Raises MachineError if the address is unavailable."""

    class Handler(BaseHTTPRequestHandler):
        timeout = _SILENT_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self._answer(HTTPStatus.NOT_FOUND, "the figures are at /metrics\n")
                return
            try:
                self._answer(HTTPStatus.OK, source.text())
            except (QdistError, OSError) as error:
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"error: {error}\n")

        def _answer(self, status: HTTPStatus, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Do not log a scrape every few seconds."""

    try:
        return _Server((host, port), Handler)
    except OSError as error:
        raise MachineError(f"{host}:{port} cannot be served: {error.strerror}", try_="another --serve PORT") from error


def _serve(source: Source, host: str, port: int) -> None:
    with server(source, host, port) as bound:
        say(f"http://{host}:{bound.server_port}/metrics until Ctrl-C")
        bound.serve_forever()
