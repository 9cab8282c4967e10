"""Runs the server: its socket, its signals, and the model, which is loaded while the server says so."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import uvicorn
from starlette.routing import Route

from qdist.core.errors import JobError, MachineError, QdistError
from qdist.core.requests import Serve, Web
from qdist.core.sampling import Sampling
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import ServedTargets, targets_to_serve
from qdist.host.terminal import say
from qdist.runtime.infer.ready import Ready, open_answerer
from qdist.runtime.infer.runner import Runner
from qdist.runtime.quantize.materialize import trust
from qdist.runtime.serve.app import Service, application
from qdist.runtime.serve.asking import Served
from qdist.runtime.serve.connections import Connection
from qdist.runtime.serve.desk import Desk
from qdist.runtime.serve.web import announce_page, page_routes

KEY = "QDIST_API_KEY"
"""Environment variable with the key that clients must send."""
_AHEAD = (Sampling(), Sampling(temperature=1))
"""What clients ask for most: the likeliest tokens, and OpenAI's default."""
_GLANCE_S = 0.1
_ONE_SIGNAL_S = 0.5
"""Seconds within which signals are one: systemd and `timeout` send theirs to this process and to its parent, which
passes it on."""
_LAST_BYTES_S = 30
"""Seconds that clients have to read the ends of their answers when the server ends."""
T = TypeVar("T")


def run(request: Serve) -> None:
    """Serve until SIGTERM or Ctrl-C; what is being answered then is finished. A second one ends at once.

    Raises MachineError for an address that cannot be bound, and what loading or answering raises.
    """
    _run(request, targets_to_serve(request.runs))


def run_page(request: Web) -> None:
    """`run`, with a page to talk to the models; it shows the curves of the first run."""
    targets = targets_to_serve(request.runs)
    path = next(iter(targets.paths.values()))
    shown = RunDir(path)
    pages = page_routes(shown if shown.exists() else None)
    _run(request, targets, pages, announce=partial(announce_page, opens=request.opens))


def _run(
    request: Serve | Web, targets: ServedTargets, pages: Sequence[Route] = (), *,
    announce: Callable[[str], None] = lambda address: None,
) -> None:  # fmt: skip
    """announce: called with the server's address once it is bound."""
    if request.trust_remote_code:
        for path in targets.paths.values():
            trust(path)

    def load() -> Ready:
        return open_answerer(
            targets.paths,
            slots=request.slots,
            tokens=request.context,
            engine=request.engine,
            max_memory_bytes=request.max_memory_bytes,
            dtype=request.dtype,
            ahead=_AHEAD,
        )

    with bound_to(request.host, request.port) as listening:
        announce(address_of(listening))
        most = request.slots + request.queue
        asyncio.run(serve(listening, targets, load, most=most, host=request.host, pages=pages))


async def serve(
    listening: socket.socket, targets: ServedTargets, load: Callable[[], Ready], *, most: int, host: str,
    pages: Sequence[Route] = (),
) -> None:  # fmt: skip
    """Serve on a bound socket until a signal.

    load: opens the model; called on a thread of its own. most: answers at work and in line. pages: more addresses.
    """
    key = os.environ.get(KEY, "")
    service = Service(key=key, hosts=() if key else loopback_names(host), started=int(time.time()))
    if not key and not loopback_names(host):
        say(f"note: anyone who reaches {host} may ask; set {KEY} to want a key of them", err=True)
    ended = _signalled()
    async with _listening(listening, service, pages):
        loading = asyncio.ensure_future(_on_thread(load))
        await _first_of(loading, ended)
        if not loading.done():
            return
        ready = loading.result()
        say(ready.where, err=True)
        failed, when_failed = _failing()
        with Runner(ready.answerer, when_failed=when_failed) as runner:
            desk = Desk(runner, models_of(ready, targets), service.meters, most=most)
            service.open(desk)
            say(_about(listening, targets, desk))
            await _first_of(failed, ended)
            service.phase = "draining"
            while not (failed.done() or desk.idle):
                await asyncio.wait({failed}, timeout=_GLANCE_S)
            if failed.done():
                service.fail(failed.result().message)
                desk.fail(failed.result())
    desk.close()
    if failed.done():
        raise failed.result()


def _failing() -> tuple[asyncio.Future[QdistError], Callable[[QdistError], None]]:
    """What a runner tells, on its own thread, of the error that ended it."""
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[QdistError] = loop.create_future()

    def when_failed(error: QdistError) -> None:
        loop.call_soon_threadsafe(failed.set_result, error)

    return failed, when_failed


async def _first_of(*futures: "asyncio.Future[Any]") -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def models_of(ready: Ready, targets: ServedTargets) -> Mapping[str, Served]:
    """What is served, by the names that clients give: adapters first, then the base."""
    names = sorted(ready.speeches, key=lambda name: (not name, list(targets.paths).index(name) if name else 0))
    found = [Served(name or targets.base, name, ready.speeches[name]) for name in names]
    return {each.name: each for each in found}


def _signalled() -> "asyncio.Future[float]":
    """Done with the first SIGTERM or Ctrl-C; a second one ends the process."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Future[float] = loop.create_future()

    def hear(number: signal.Signals) -> None:
        if not heard.done():
            heard.set_result(loop.time())
        elif loop.time() - heard.result() > _ONE_SIGNAL_S:
            os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, hear, number)
    return heard


async def _on_thread(work: Callable[[], T]) -> T:
    """The result of work on a thread that does not keep the process from ending. Raises its QdistError."""
    done = Future[T]()
    done.set_running_or_notify_cancel()

    def call() -> None:
        error: QdistError | None = JobError("a fault ended the loading; its traceback was printed")
        try:
            done.set_result(work())
            error = None
        except QdistError as found:
            error = found
        finally:
            if error:
                done.set_exception(error)

    threading.Thread(target=call, name="loading", daemon=True).start()
    return await asyncio.wrap_future(done)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers, which would end answers' process by the signal itself."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


@contextlib.asynccontextmanager
async def _listening(listening: socket.socket, service: Service, pages: Sequence[Route]) -> AsyncIterator[None]:
    """The server in the background; at the end it closes its connections once their answers are sent."""
    for name in ("uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.ERROR)
    config = uvicorn.Config(
        application(service, pages),
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(Connection.patience_s),
        timeout_graceful_shutdown=_LAST_BYTES_S,
    )
    server = _Uvicorn(config)
    running = asyncio.ensure_future(server.serve(sockets=[listening]))
    try:
        yield
    finally:
        server.should_exit = True
        await running


def bound_to(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises MachineError if that is taken or not of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(1)  # another listener is told of here at the latest
        except BaseException:
            found.close()
            raise
    except OSError as error:
        try_ = f"--port {port + 1 if port < 65535 else 8000}" if error.errno in (98, 13, 48) else "--host 127.0.0.1"
        raise MachineError(f"{host}:{port} cannot be served: {error.strerror}", try_=try_) from error
    return found


def loopback_names(host: str) -> tuple[str, ...]:
    """Names by which clients of this machine call a server on a loopback address; none if others reach it."""
    try:
        inside = ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = host == "localhost"
    return ("localhost", "127.0.0.1", "::1", host) if inside else ()


def _about(listening: socket.socket, targets: ServedTargets, desk: Desk) -> str:
    return f"serving {targets.title} at {address_of(listening)}/v1 (models: {', '.join(desk.models)})"


def address_of(listening: socket.socket) -> str:
    """'http://127.0.0.1:8000'."""
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"
