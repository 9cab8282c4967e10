"""One host's part in measuring the network: `python -m qdist.host.nodes.speed`, with a Part on its standard input.

It waits for connections of another host until its standard input ends, or connects to one that waits, or keeps what
all have measured.
"""

import hmac
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from statistics import median

import msgspec

from qdist.core.errors import QdistError, RunError
from qdist.core.nodes.job import AgentLine
from qdist.core.nodes.pairs import Pair
from qdist.host.nodes.network import keep_pairs
from qdist.host.opening import reason_of
from qdist.host.terminal import say_json

SECONDS, ROUND_TRIPS, STREAMS = 2.0, 100, 4
"""Seconds of each measurement of bytes, one-byte messages there and back, and connections at a time."""
TOKEN_BYTES = 32
_CHUNK = bytes(1 << 18)
_PATIENCE_S = 20.0
"""Seconds without a byte after which a connection is given up."""
_COUNTED = struct.Struct("!dQ")
"""Seconds from the first byte to the last, and how many bytes came."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a host is to do."""

    address: str = ""
    """Its own address."""
    token: str = ""
    """What the other host has to say first."""
    peer: tuple[str, int] | None = None
    """The address and port of a host that waits; None to wait."""
    seconds: float = SECONDS
    keep: tuple[Pair, ...] = ()
    """What all have measured."""
    source: str = ""


class Waits(msgspec.Struct, frozen=True):
    """A host waits for others on a port."""

    port: int


class Waiting:
    """A host that answers the others' connections, in threads, until it is closed."""

    def __init__(self, address: str, token: str) -> None:
        self._token = token.encode()
        self._listener = socket.create_server((address, 0), family=_family(address))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no further connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        answers = {b"e": _echo, b"s": _sink, b"g": _pour}
        with connection, suppress(OSError):  # the other end is gone, or has what it wanted
            connection.settimeout(_PATIENCE_S)
            said = _read(connection, TOKEN_BYTES + 1)
            if hmac.compare_digest(said[:-1], self._token) and said[-1:] in answers:
                answers[said[-1:]](connection)


def _read(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count and (more := connection.recv(count - len(found))):
        found += more
    return found


def _echo(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while said := connection.recv(64):
        connection.sendall(said)


def _sink(connection: socket.socket) -> None:
    connection.sendall(_COUNTED.pack(*_drain(connection, until=float("inf"))))


def _pour(connection: socket.socket) -> None:
    while True:
        connection.sendall(_CHUNK)


def _drain(connection: socket.socket, *, until: float) -> tuple[float, int]:
    """Read to the end, or for `until` seconds: seconds from the first bytes to the last, and how many came."""
    room = bytearray(len(_CHUNK))
    connection.recv_into(room)
    began, count = time.monotonic(), 0
    while (now := time.monotonic()) - began < until and (size := connection.recv_into(room)):
        count += size
    return now - began, count


def measure(part: Part) -> Pair:
    """Latency and bytes/s between this host and one that waits. Raises RunError if it cannot be reached."""
    assert part.peer is not None
    address, port = part.peer
    try:
        latency_s = _latency(part)
        rates = [
            (_together(streams, lambda: _send(part)), _together(streams, lambda: _receive(part)))
            for streams in (1, STREAMS)
        ]
    except OSError as error:
        raise RunError(
            f"{address} does not answer on port {port}: {reason_of(error)}",
            try_="a firewall that lets the hosts reach each other on all ports",
        ) from None
    return Pair(addresses=(part.address, address), latency_s=latency_s, one_bytes_s=rates[0], four_bytes_s=rates[1])


def _connected(part: Part, verb: bytes) -> socket.socket:
    connection = socket.create_connection(part.peer, _PATIENCE_S, (part.address, 0)) if part.peer else socket.socket()
    connection.sendall(part.token.encode() + verb)
    return connection


def _latency(part: Part) -> float:
    with _connected(part, b"e") as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return median(_round_trip(connection) for _ in range(ROUND_TRIPS)) / 2


def _round_trip(connection: socket.socket) -> float:
    began = time.monotonic()
    connection.sendall(b"x")
    if not connection.recv(1):
        raise ConnectionError("the connection was closed")
    return time.monotonic() - began


def _send(part: Part) -> float:
    with _connected(part, b"s") as connection:
        end = time.monotonic() + part.seconds
        while time.monotonic() < end:
            connection.sendall(_CHUNK)
        connection.shutdown(socket.SHUT_WR)
        seconds, count = _COUNTED.unpack(_read(connection, _COUNTED.size))
    return float(count) / max(float(seconds), 1e-9)


def _receive(part: Part) -> float:
    with _connected(part, b"g") as connection:
        seconds, count = _drain(connection, until=part.seconds)
    return count / max(seconds, 1e-9)


def _together(streams: int, rate: Callable[[], float]) -> float:
    """Bytes/s of several connections at a time."""
    with ThreadPoolExecutor(streams) as pool:
        return sum(each.result() for each in [pool.submit(rate) for _ in range(streams)])


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def main() -> None:
    """Do this host's part, and print what came of it as JSON, or an AgentLine with the error."""
    part = msgspec.json.decode(sys.stdin.buffer.readline(), type=Part)
    try:
        if part.keep:
            say_json(msgspec.json.encode(str(keep_pairs(part.keep, part.source))))
        elif part.peer:
            say_json(msgspec.json.encode(measure(part)))
        else:
            waiting = Waiting(part.address, part.token)
            say_json(msgspec.json.encode(Waits(waiting.port)))
            sys.stdin.buffer.read()
            os._exit(0)  # threads that still send would hold the process
    except QdistError as error:
        say_json(msgspec.json.encode(AgentLine(kind="error", text=error.message, try_=error.try_)))


if __name__ == "__main__":
    main()
