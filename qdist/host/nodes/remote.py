"""How does a node read and write the files of a run on another node?"""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from qdist.core.errors import RunError
from qdist.host.nodes.door import REACH_S, connect
from qdist.host.nodes.wire import Wire
from qdist.host.nodes.words import Ask, Listed, Reply

_ANSWER_S = 60.0
"""Seconds without a byte after which a request has failed: a large file may take long to reach the disk."""
T = TypeVar("T")


class Refused(RunError):
    """The other node has answered that it cannot do what was asked."""


class Missing(Refused):
    """There is no such file on the other node."""


class Files:
    """Files of the run directory behind a gate, by paths relative to it, over one connection that is kept.

    A request whose connection broke is sent once more over a new one. May be used by several threads.

    All methods raise Refused or Missing for what the other node cannot do, and RunError if it cannot be reached.
    """

    def __init__(self, endpoint: tuple[str, int], token: str, *, reach_s: float = REACH_S) -> None:
        self._endpoint, self._token, self._reach_s = endpoint, token, reach_s
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._closed = False

    def close(self) -> None:
        """End the connection, also under a request of another thread, which fails; none can follow."""
        self._closed = True
        if sock := self._sock:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._drop()

    def hello(self) -> tuple[str, str]:
        """Id of the run and name of the node there."""
        reply, _ = self._ask(Ask("hello"))
        return reply.run, reply.name

    def list(self, below: str = "") -> dict[str, int]:
        """Regular files there by path, with their sizes. below: a folder; none if it does not exist."""
        _, content = self._ask(Ask("list", path=below))
        return msgspec.json.decode(content, type=Listed).files

    def get(self, path: str, offset: int = 0, length: int | None = None) -> tuple[bytes, int]:
        """Bytes of a file from `offset` on, by default all, and the size of the file."""
        reply, content = self._ask(Ask("get", path=path, offset=offset, length=length))
        return content, reply.size

    def fetch(self, path: str, to: Path) -> None:
        """Copy a file to here. It is neither flushed nor renamed: `to` lies in a folder that is not published yet."""
        self._asked(Ask("get", path=path), b"", lambda blocks: _write(to, blocks))

    def append(self, path: str, offset: int, content: bytes) -> int:
        """Add to the end of a file if it has `offset` bytes; its size afterwards, or as it is where it has others."""
        return self._ask(Ask("append", path=path, offset=offset, size=len(content)), content)[0].size

    def put(self, path: str, content: bytes | Path, *, flush: bool = True) -> None:
        """Replace a file, at one moment, by given bytes or those of a file here.

        flush: to the disk first, so that a machine that loses its power has the old file or the new one.
        """
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        self._ask(Ask("put", path=path, size=size, flush=flush), content)

    def publish(self, beside: str, final: str) -> None:
        """Give a finished folder its name, in place of another of that name if there is one."""
        self._ask(Ask("publish", path=beside, to=final))

    def _ask(self, ask: Ask, content: bytes | Path = b"") -> tuple[Reply, bytes]:
        return self._asked(ask, content, b"".join)

    def _asked(self, ask: Ask, content: bytes | Path, take: Callable[[Iterator[bytes]], T]) -> tuple[Reply, T]:
        """Send a request and what it announces; the reply, and what `take` makes of the bytes that follow it."""
        with self._lock:
            while True:
                kept = self._sock is not None
                try:
                    return self._exchange(ask, content, take)
                except ConnectionError as error:
                    self._drop()
                    if not kept or self._closed:
                        raise self._lost(error) from error
                except Refused:
                    raise
                except BaseException:
                    self._drop()  # bytes of this request may still be on their way
                    raise

    def _exchange(self, ask: Ask, content: bytes | Path, take: Callable[[Iterator[bytes]], T]) -> tuple[Reply, T]:
        wire = Wire(self._connected())
        if isinstance(content, Path):
            with content.open("rb") as file:
                wire.send(ask)
                wire.send_file(file, 0, ask.size)
        else:
            wire.send(ask, content)
        reply = wire.receive(Reply)
        if reply.error:
            raise (Missing if reply.missing else Refused)(f"{self._there()}: {reply.error}")
        wire.expect(reply.body)
        return reply, take(wire.blocks())

    def _connected(self) -> socket.socket:
        if self._closed:
            raise RunError(f"the connection to {self._there()} is closed")
        if self._sock is None:
            self._sock = connect(self._endpoint, self._token, self._reach_s)
            self._sock.settimeout(_ANSWER_S)
        return self._sock

    def _drop(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _there(self) -> str:
        return "{}:{}".format(*self._endpoint)

    def _lost(self, error: ConnectionError) -> RunError:
        return RunError(f"the connection to {self._there()} broke: {error}", try_=f"ping {self._endpoint[0]}")


def _write(to: Path, blocks: Iterator[bytes]) -> None:
    descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    with open(descriptor, "wb") as file:
        for block in blocks:
            file.write(block)
