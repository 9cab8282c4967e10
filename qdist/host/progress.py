"""Progress of a long job, its rate and the time left, as a line on standard error."""

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType

from qdist.core.text import format_bytes, format_duration
from qdist.host.terminal import say

_SOON_S, _LATE_S = 1.0, 10.0
"""Least and most seconds between lines without a terminal, where each tenth of the job gets a line."""


class ProgressLine:
    """A context that reports the parts of a job as they are done.

    On a terminal it is one line that changes; elsewhere a line for each tenth, or every ten seconds.
    """

    def __init__(
        self,
        total: int,
        what: str,
        *,
        done: int = 0,
        in_bytes: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """total: parts or bytes; 0 until it is known. what: the verb for them, such as 'answered'.

        done: by an earlier process.
        """
        self._total, self._what, self._in_bytes, self._clock = total, what, in_bytes, clock
        self._before = self._done = done
        self._began = self._told = clock()
        self._tenth, self._live, self._open = 10 * done // max(1, total), sys.stderr.isatty(), False

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:  # what is said next, an error perhaps, has a line of its own
            say(err=True)

    def restart(self) -> None:
        """Count the rate from now on: what came before, such as loading a model, was no part of the job."""
        self._began = self._told = self._clock()

    def expect(self, total: int) -> None:
        """Say how many parts there are, once that is known."""
        self._total = total

    def advance(self, parts: int, where: str = "") -> None:
        """Count more parts as done. where: the last of them, such as 'layer 3 of 24'."""
        self._done += parts
        now, tenth = self._clock(), 10 * self._done // self._total if self._total else 0
        last = 0 < self._total <= self._done
        waited = now - self._told
        if self._live or last or waited >= _LATE_S or (tenth > self._tenth and waited >= _SOON_S):
            self._told, self._tenth, self._open = now, tenth, self._live and not last
            line = self._line(now - self._began, where)
            if self._live:
                line = line[: shutil.get_terminal_size().columns - 1]
            say(line, end="" if self._open else "\n", err=True, over=self._live)

    def _line(self, seconds: float, where: str) -> str:
        """'  layer 3 of 24, 1.2 GiB of 3.4 GiB read, 312 MB/s, 7 s left'."""
        shown = format_bytes if self._in_bytes else "{:,}".format
        of = f" of {shown(self._total)}" if self._total else ""
        words = [where, f"{shown(self._done)}{of} {self._what}"]
        own, left = self._done - self._before, self._total - self._done
        if own > 0 and seconds > 0:
            words.append(_rate(own / seconds, in_bytes=self._in_bytes))
            words.append(f"{format_duration(left * seconds / own)} left" if left > 0 else "")
        return "  " + ", ".join(filter(None, words))


def _rate(per_s: float, *, in_bytes: bool) -> str:
    """'312 MB/s', '3.1/s', '4.2 s each'."""
    if in_bytes:
        return f"{per_s / 1e6:.0f} MB/s"
    return f"{per_s:.1f}/s" if per_s >= 1 else f"{1 / per_s:.1f} s each"
