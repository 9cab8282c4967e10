"""A blocking connection of requests and replies: lines of JSON, and the bytes that follow them."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, TypeVar

import msgspec

from qdist.host.nodes.splice import LONGEST_LINE

_BLOCK = 1 << 20
T = TypeVar("T")


class Wire:
    """Reads and writes one socket. Every failure of it is a ConnectionError, so none is taken for one of a disk.

    rest: bytes that were read from the socket before.
    """

    def __init__(self, sock: socket.socket, rest: bytes = b"") -> None:
        self._sock, self._rest, self._owed = sock, rest, 0

    def send(self, message: msgspec.Struct, data: bytes = b"") -> None:
        """Send one line, and the bytes that it announces."""
        with _broken():
            self._sock.sendall(msgspec.json.encode(message) + b"\n" + data)

    def send_file(self, file: BinaryIO, offset: int, count: int) -> None:
        """Send part of a file. Raises ConnectionError if it has become shorter."""
        with _broken():
            if count and self._sock.sendfile(file, offset, count) != count:
                raise ConnectionAbortedError("the file was cut while it was sent")

    def receive(self, kind: type[T]) -> T:
        """The next line. Raises ConnectionError also for a line that is none of ours."""
        while b"\n" not in self._rest:
            if len(self._rest) > LONGEST_LINE:
                raise ConnectionAbortedError(f"a line of more than {LONGEST_LINE} bytes")
            self._rest += self._read(LONGEST_LINE)
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            return msgspec.json.decode(line, type=kind)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ConnectionAbortedError(f"not a line of ours: {error}") from error

    def expect(self, size: int) -> None:
        """Note that `size` bytes follow the line that was read last."""
        self._owed = max(0, size)

    def blocks(self) -> Iterator[bytes]:
        """The bytes that follow the last line, as they come."""
        while self._owed:
            block = self._rest[: self._owed] or self._read(min(_BLOCK, self._owed))
            self._rest = self._rest[len(block) :]
            self._owed -= len(block)
            yield block

    def drain(self) -> None:
        """Skip what is left of them."""
        for _ in self.blocks():
            pass

    def _read(self, most: int) -> bytes:
        with _broken():
            data = self._sock.recv(most)
        if not data:
            raise ConnectionResetError("the other side closed the connection")
        return data


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        raise ConnectionResetError(str(error)) from error
