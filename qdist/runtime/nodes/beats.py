"""Who is heard of: each node sets a count in the store every second, and watches whether the others' counts change."""

import os
import threading
import time
from collections.abc import Iterable
from typing import Any

BEAT_S = 1.0
CLOCK = "clock"
LOST_S = 10.0
"""Seconds without a beat after which a node is lost: stopped, dead or cut off."""


class Beats:
    """This node's beats through a connection of their own, and the silence of others.

    Silence is counted in own beats, so that a node which was stopped itself takes nobody for lost when it wakes.

    store: a client of the run's store that nobody else uses. serves: whether others compare their clocks with this
    node's.
    """

    def __init__(self, store: Any, node: int, *, serves: bool) -> None:
        self._store, self._node, self._serves = store, node, serves
        self._heard: dict[int, tuple[bytes, int]] = {}
        self._count, self._last, self._broken = 0, time.monotonic(), False
        self._ended = threading.Event()

    def start(self) -> None:
        """Beat from a thread of its own."""
        threading.Thread(target=self._beat, daemon=True, name="node beats").start()

    def watch(self, nodes: Iterable[int]) -> None:
        """From now on, listen to these nodes."""
        self._heard = {node: (b"", self._count) for node in nodes if node != self._node}

    def watched(self) -> set[int]:
        return set(self._heard)

    def silent(self) -> dict[int, float]:
        """Watched nodes that are lost, with the seconds since they were last heard of."""
        silence = {node: (self._count - since) * BEAT_S for node, (_, since) in dict(self._heard).items()}
        return {node: seconds for node, seconds in silence.items() if seconds >= LOST_S}

    @property
    def cut_off(self) -> bool:
        """Whether this node itself does not reach the store."""
        return self._broken or time.monotonic() - self._last > LOST_S

    def unreached_s(self) -> float:
        """Seconds since this node last reached the store."""
        return time.monotonic() - self._last

    def end(self) -> None:
        self._ended.set()

    def beat_once(self) -> None:
        """Set the own count and look at the others'. Raises RuntimeError where the store is gone."""
        if self._serves:
            self._store.set(CLOCK, repr(time.time()))
        self._store.set(f"beat/{self._node}", f"{os.getpid()}.{self._count}")
        heard = self._beats_of(list(self._heard))
        self._count += 1
        for node, beat in heard.items():
            if beat and node in self._heard and beat != self._heard[node][0]:
                self._heard[node] = (beat, self._count)
        self._last = time.monotonic()

    def _beat(self) -> None:
        while True:
            try:
                self.beat_once()
            except RuntimeError:  # of torch's stores, whose connection is gone
                self._broken = True
                return
            if self._ended.wait(BEAT_S):
                return

    def _beats_of(self, nodes: list[int]) -> dict[int, bytes]:
        """The nodes' last beats; empty of those that never beat. Two questions to the store where all have."""
        keys = [f"beat/{node}" for node in nodes]
        if not nodes or self._store.check(keys):
            values = self._store.multi_get(keys) if nodes else []
            return dict(zip(nodes, map(bytes, values), strict=True))
        return {node: self._of(node) for node in nodes}

    def _of(self, node: int) -> bytes:
        key = f"beat/{node}"
        return bytes(self._store.get(key)) if self._store.check([key]) else b""
