"""Who is let in to a run: the one port of a node that others reach, which opens to those who know the run's token."""

import asyncio
import errno
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self

import msgspec

from qdist.core.errors import RunError
from qdist.host.nodes.serving import serve_files
from qdist.host.nodes.splice import Lines, Service, splice, tune
from qdist.host.nodes.token import REFUSED, draw_nonce, greeting, verdict
from qdist.host.nodes.wire import Wire
from qdist.host.nodes.words import Ask, Reply

PROOF_S = 5.0
"""Seconds that a stranger has to prove that it knows the token."""
_MOST_STRANGERS, _MOST = 1024, 16_384
"""Connections at once that have proved nothing yet, and all."""
_TOLD_S, _MOST_TOLD = 60.0, 1024
"""Seconds between two reports of one address, and addresses that are remembered."""


class Gate:
    """Listens on exactly one address and port; spliced to the store, or answered about files, is who knows the token.

    store: loopback address of the store that this node serves; may be set later and changed.
    who: the `run` and `name` that 'hello' is answered with.
    say: called from another thread with a line for the user.

    Raises RunError if the address or port cannot be listened on.
    """

    def __init__(
        self, address: tuple[str, int], token: str, *, store: tuple[str, int] | None, folder: Path,
        who: Mapping[str, str] | None = None, say: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.store = store
        self._token, self._folder, self._who, self._say = token, folder, who or {}, say
        self._strangers = self._all = 0
        self._told: dict[str, float] = {}
        listener = _listen(*address)
        self.port: int = listener.getsockname()[1]
        self._service = Service(listener, self._attend, name="gate")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the listener and every connection."""
        self._service.close()

    async def _attend(self, sock: socket.socket) -> None:
        if self._strangers >= _MOST_STRANGERS or self._all >= _MOST:
            return
        self._all += 1
        try:
            with suppress(OSError, ValueError, msgspec.MsgspecError):  # whatever a stranger sends
                await self._let_in(sock)
        finally:
            self._all -= 1

    async def _let_in(self, sock: socket.socket) -> None:
        tune(sock)
        lines = Lines(sock)
        self._strangers += 1
        try:
            async with asyncio.timeout(PROOF_S):
                proved = await self._challenge(sock, lines)
                ask = msgspec.json.decode(await lines.read(), type=Ask) if proved else None
        finally:
            self._strangers -= 1
        if ask and ask.verb == "store":
            await self._splice(sock, lines)
        elif ask:
            await self._serve_files(sock, ask, lines.rest)

    async def _challenge(self, sock: socket.socket, lines: Lines) -> bool:
        """Whether the other side knows the token; it is told either way."""
        nonce = draw_nonce()
        await lines.write(greeting(nonce))
        said = verdict(await lines.read(), self._token, nonce)
        await lines.write(said)
        if said == REFUSED:
            self._tell(sock.getpeername()[0])
        return said != REFUSED

    def _tell(self, address: str) -> None:
        now = time.monotonic()
        self._told = {known: at for known, at in self._told.items() if now - at < _TOLD_S}
        if address not in self._told and len(self._told) < _MOST_TOLD:
            self._told[address] = now
            self._say(f"{address} was not let in to the run: its token is wrong")

    async def _splice(self, sock: socket.socket, lines: Lines) -> None:
        if self.store is None:
            await lines.write(msgspec.json.encode(Reply(error="this node does not serve the store")))
            return
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as store:
            store.setblocking(False)
            store.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await loop.sock_connect(store, self.store)
            except OSError as error:
                await lines.write(msgspec.json.encode(Reply(error=f"its store does not answer: {error.strerror}")))
                return
            await lines.write(msgspec.json.encode(Reply()))
            await loop.sock_sendall(store, lines.rest)
            await splice(sock, store)

    async def _serve_files(self, sock: socket.socket, ask: Ask, rest: bytes) -> None:
        """Files wait for disks, and get a thread: the store's connections must not wait with them."""
        done: Future[None] = Future()
        thread = Thread(target=self._serve, args=(sock.dup(), ask, rest, done), daemon=True, name="gate-files")
        thread.start()
        try:
            await asyncio.wrap_future(done)
        finally:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _serve(self, sock: socket.socket, ask: Ask, rest: bytes, done: Future[None]) -> None:
        try:
            with closing(sock), suppress(ConnectionError):
                sock.settimeout(None)  # an idle connection is kept; the kernel ends a dead one
                serve_files(Wire(sock, rest), ask, self._folder, self._who)
        finally:
            with suppress(InvalidStateError):  # the gate was closed meanwhile
                done.set_result(None)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises RunError, naming address and port."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise RunError(f"{host} is not a known host: {error.strerror}", try_="the numeric address") from error
    if address[0] in ("0.0.0.0", "::"):
        raise RunError(f"{host or 'no address'} is every address of this machine", try_="the address of one interface")
    sock = socket.socket(family, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(4096)
    except OSError as error:
        sock.close()
        raise _unbound(host, port, error) from error
    return sock


def _unbound(host: str, port: int, error: OSError) -> RunError:
    match error.errno:
        case errno.EADDRINUSE:
            return RunError(
                f"port {port} of {host} is in use by another program", try_=f"another port, such as {port + 1}"
            )
        case errno.EADDRNOTAVAIL:
            return RunError(f"{host} (port {port}) is not an address of this machine", try_="ip -brief address")
        case _:
            return RunError(f"{host}:{port} cannot be listened on: {error.strerror}", try_="a port from 1024 to 65535")
