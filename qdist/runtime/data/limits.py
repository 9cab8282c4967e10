"""Runs foreign code, such as a chat template, within limits of time and memory."""

import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

MOST_S = 10.0
MOST_BYTES = 1 << 30
_KILLED_S = 30.0


class TooLong(BaseException):
    """A call took longer than `MOST_S`. Not an Exception, so that the interrupted code does not catch it."""


def limited(call: Callable[[], T]) -> T:
    """The result of a call. Raises TooLong, MemoryError, and whatever the call raises.

    Signals are the main thread's alone: in others there is the limit of memory, and that on Linux.
    """
    if threading.current_thread() is not threading.main_thread():
        return _small(call)
    _listen()
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_S)
    signal.setitimer(signal.ITIMER_PROF, _KILLED_S)
    try:
        return _small(call)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


@cache
def _listen() -> None:
    """Install the handler, once: that takes as long as rendering a short conversation."""
    signal.signal(signal.SIGVTALRM, _ring)


def _ring(*_: object) -> None:
    raise TooLong


def _small(call: Callable[[], T]) -> T:
    if sys.platform != "linux":
        return call()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = _address_space(int(time.monotonic())) + MOST_BYTES
    if limits[0] == resource.RLIM_INFINITY or most < limits[0]:
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@lru_cache(maxsize=1)
def _address_space(_second: int) -> int:
    """Bytes mapped by this process, looked up at most once a second."""
    return int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
