"""Where a step's time went. On a GPU by its own events, since Python is ahead of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Marks on the way through a step. It runs from when it is made."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began = time.perf_counter()
        self._marks: dict[str, Any] = {}
        self.data_s = 0.0
        """Seconds in `data`, on the CPU."""
        self.mark("began")

    def mark(self, name: str) -> None:
        """This place in the step; on a GPU, when it gets here."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    @contextmanager
    def data(self) -> Iterator[None]:
        """Samples are being made."""
        began = time.perf_counter()
        yield
        self.data_s += time.perf_counter() - began

    def between(self, first: str, last: str) -> float:
        """Seconds from one mark to another. A GPU must have come to the second."""
        if self._cuda:
            milliseconds: float = self._marks[first].elapsed_time(self._marks[last])
            return milliseconds / 1e3
        seconds: float = self._marks[last] - self._marks[first]
        return seconds

    def total(self) -> float:
        """Seconds so far, by the CPU's clock."""
        return time.perf_counter() - self._began
