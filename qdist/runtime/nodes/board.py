"""What nodes of one rendezvous tell each other in its store; waiting ends when one of them is lost."""

import time
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from qdist.host.run.rundir import Ended

T = TypeVar("T")
_LOOK_S = 0.1


class Disrupted(Exception):
    """A node was lost while others waited for its word: they have to meet again."""


class CutOff(Exception):
    """This node does not reach the store any more."""


class Left(Exception):
    """This node was told to leave the run to the others."""


class RunEnded(Exception):
    """The run has ended, as one of its nodes said."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended.message)
        self.ended = ended


class Board:
    """Values by name, seen by all nodes of one rendezvous.

    store: of the rendezvous round. look: called while waiting; raises what ends the wait.
    """

    def __init__(self, store: Any, look: Callable[[], None]) -> None:
        self._store, self._look = store, look

    def put(self, key: str, value: object) -> None:
        """Raises CutOff where the store is gone, as all methods do."""
        # A store takes no more than 8 MiB at a time, and a plan for 512 nodes is long.
        self._told(lambda: self._store.set(key, zlib.compress(msgspec.json.encode(value), level=1)))

    def has(self, *keys: str) -> bool:
        """Whether all of these are there: one question to the store, however many nodes they are of."""
        return bool(self._told(lambda: self._store.check(list(keys))))

    def take(self, key: str, kind: type[T], *, limit_s: float | None = None) -> T:
        """The value, once it is there. Raises Disrupted after `limit_s` seconds; None waits as long as all live."""
        began = time.monotonic()
        while not self.has(key):
            self._look()
            if limit_s is not None and time.monotonic() - began > limit_s:
                raise Disrupted(key)
            time.sleep(_LOOK_S)
        return msgspec.json.decode(zlib.decompress(self._told(lambda: self._store.get(key))), type=kind)

    def find(self, key: str, kind: type[T]) -> T | None:
        """The value if it is there."""
        return self.take(key, kind) if self.has(key) else None

    def _told(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except RuntimeError as error:  # torch's stores raise nothing narrower for a connection that is gone
            raise CutOff(str(error)) from error
