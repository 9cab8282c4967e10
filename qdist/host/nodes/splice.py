"""Sockets between nodes: lines and spliced bytes on one event loop, in a thread that ends with all its connections."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

LONGEST_LINE = 4096
"""Bytes of a header line; whoever sends more is no node of ours."""
DEAD_S = 10
"""Seconds without an acknowledgement after which the kernel ends a connection."""
_BLOCK = 1 << 17
_WAIT_S = 0.1
"""Pause after an accept that failed, as without free file descriptors."""

Handle = Callable[[socket.socket], Awaitable[None]]


def tune(sock: socket.socket) -> None:
    """Have the kernel end a connection whose other side is silent for some 12 s, whether or not data is in flight."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_S * 1000)


class Lines:
    """Reads header lines from a non-blocking socket. `rest`: what came after the last one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self.rest = sock, b""

    async def read(self) -> bytes:
        """The next line, without its end. Raises ConnectionError at the end of the stream, ValueError if too long."""
        while b"\n" not in self.rest:
            if len(self.rest) > LONGEST_LINE:
                raise ValueError(f"a line of more than {LONGEST_LINE} bytes")
            data = await asyncio.get_running_loop().sock_recv(self._sock, LONGEST_LINE)
            if not data:
                raise ConnectionResetError("the other side closed the connection")
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    async def write(self, line: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, line + b"\n")


async def splice(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes between two sockets, both ways, until either ends. Errors of either are its end."""
    pumps = [asyncio.create_task(_pump(one, other)), asyncio.create_task(_pump(other, one))]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.wait(pumps)


async def _pump(source: socket.socket, sink: socket.socket) -> None:
    loop, block = asyncio.get_running_loop(), memoryview(bytearray(_BLOCK))
    with contextlib.suppress(OSError):
        while count := await loop.sock_recv_into(source, block):
            await loop.sock_sendall(sink, block[:count])


class Service:
    """Accepts connections on a thread of its own, each handled by a task; the handler need not close the socket.

    The listener is closed with the service.
    """

    def __init__(self, listener: socket.socket, handle: Handle, *, name: str) -> None:
        listener.setblocking(False)
        self._listener, self._handle = listener, handle
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._work, daemon=True, name=name)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the listener and all connections; may be called again."""
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _work(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._listener.close()
            self._loop.close()

    async def _serve(self) -> None:
        accepting = asyncio.create_task(self._accept())
        await self._closing.wait()
        accepting.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait({accepting, *self._tasks})

    async def _accept(self) -> None:
        while True:
            try:
                sock, _ = await self._loop.sock_accept(self._listener)
            except OSError:
                await asyncio.sleep(_WAIT_S)
                continue
            task = asyncio.create_task(self._attend(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _attend(self, sock: socket.socket) -> None:
        with sock:
            await self._handle(sock)
