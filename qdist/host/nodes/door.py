"""How does a process reach a run's gate: proved connections, and a port of this node that leads to the store."""

import asyncio
import errno
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from qdist.core.errors import RunError
from qdist.core.nodes.job import TOKEN
from qdist.host.nodes.splice import Lines, Service, splice, tune
from qdist.host.nodes.token import REFUSED, is_proved, respond
from qdist.host.nodes.words import Ask, Reply

REACH_S = 5.0
"""Usual seconds to wait for a gate."""
_PROC = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_MAPPED = bytes(10) + b"\xff\xff"
"""What precedes an address of IPv4 as one of IPv6."""


class WrongToken(RunError):
    """The gate and this node do not have the same token."""


def connect(endpoint: tuple[str, int], token: str, timeout: float = REACH_S) -> socket.socket:
    """A connection at a gate where both sides have proved that they know the token; the gate waits for a request.

    timeout: seconds for all of it, and those of the socket afterwards.

    Raises WrongToken, or RunError if there is no gate to reach.
    """
    sock, lines = asyncio.run(_prove(endpoint, token, timeout))
    if lines.rest:
        sock.close()
        raise _stranger(endpoint)
    sock.settimeout(timeout)
    return sock


async def _prove(endpoint: tuple[str, int], token: str, timeout: float) -> tuple[socket.socket, Lines]:
    host, port = endpoint
    try:
        async with asyncio.timeout(timeout):
            sock = await _connect(host, port)
            try:
                return sock, await _answered(sock, endpoint, token)
            except BaseException:
                sock.close()
                raise
    except TimeoutError as error:
        raise RunError(f"{host}:{port} does not answer within {timeout:g} s", try_=_look(host)) from error
    except ValueError as error:
        raise _stranger(endpoint) from error
    except OSError as error:
        raise _unreached(endpoint, error) from error


async def _connect(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    family, kind, _, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    sock = socket.socket(family, kind)
    try:
        sock.setblocking(False)
        tune(sock)
        await loop.sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


async def _answered(sock: socket.socket, endpoint: tuple[str, int], token: str) -> Lines:
    lines = Lines(sock)
    answer, expected = respond(await lines.read(), token)
    await lines.write(answer)
    said = await lines.read()
    if said == REFUSED or not is_proved(said, expected):
        host, port = endpoint
        raise WrongToken(f"{host}:{port} has another token than this node", try_=f"the same {TOKEN} on every node")
    return lines


def _stranger(endpoint: tuple[str, int]) -> RunError:
    host, port = endpoint
    return RunError(f"what listens at {host}:{port} is not a run of this qdist", try_="another port")


def _unreached(endpoint: tuple[str, int], error: OSError) -> RunError:
    host, port = endpoint
    if isinstance(error, ConnectionResetError):
        return RunError(f"{host}:{port} closed the connection", try_=_look(host))
    if error.errno == errno.ECONNREFUSED:
        return RunError(f"nothing listens at {host}:{port}", try_="start the node of that address, or check the port")
    return RunError(f"{host}:{port} cannot be reached: {error.strerror or error}", try_=_look(host))


def _look(host: str) -> str:
    return f"ping {host}"


class Door:
    """A port of 127.0.0.1 whose connections lead to the store behind a gate, for processes of this user alone."""

    def __init__(self, endpoint: tuple[str, int], token: str) -> None:
        self._endpoint, self._token = endpoint, token
        self.reached = 0.0
        """Monotonic time of the last proof at the gate; 0 before the first."""
        self.problem = ""
        """Why the last connection did not get through; empty if it did."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = listener.getsockname()[1]
        self._service = Service(listener, self._attend, name="door")

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
        if owner_of(sock) != os.geteuid():
            return
        try:
            upstream, lines = await _prove(self._endpoint, self._token, REACH_S)
        except RunError as error:
            self.problem = error.message
            return
        self.reached = time.monotonic()
        with upstream, suppress(OSError, ValueError, msgspec.MsgspecError):
            await lines.write(msgspec.json.encode(Ask("store")))
            reply = msgspec.json.decode(await lines.read(), type=Reply)
            self.problem = reply.error
            if not reply.error:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await asyncio.get_running_loop().sock_sendall(sock, lines.rest)
                await splice(sock, upstream)


def owner_of(sock: socket.socket, *, tables: Sequence[Path] = _PROC) -> int | None:
    """The user of the process at the other end of a loopback connection; None if it is gone.

    tables: the kernel's (proc_net_tcp(5)), with addresses, ports and the state, 01 of a connection, in hexadecimal
    digits. A connection that torch makes is in that of IPv6, with mapped addresses.
    """
    peer, own = sock.getpeername(), sock.getsockname()
    for table in (*tables, *tables):  # a line may be passed over while the table changes
        content = table.read_text() if table.exists() else ""
        for prefix in (b"", _MAPPED):
            ends = f": {_kernels(prefix, *peer)} {_kernels(prefix, *own)} 01 "
            _, found, rest = content.partition(ends)
            if found:
                return int(rest.split(maxsplit=4)[3])
    return None


def _kernels(prefix: bytes, host: str, port: int) -> str:
    """An address and a port as in the kernel's tables: words of four bytes, each as a number of this machine."""
    words = memoryview(prefix + socket.inet_aton(host)).cast("I")
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
