"""Runs what a stranger's chat template says within a limit of time and memory.

transformers' sandbox keeps a template from Python's insides and from ranges above 100,000. It lets pass nested loops,
`'a' * 10**10` and `10**(10**9)`. So a call here may take `MOST_S` of the processor, by a signal that Python answers
between two operations, and `MOST_BYTES` of address space, by the kernel, which also bounds what one operation in C can
take. One that goes on all the same ends the process: after `_KILLED_S` the kernel kills it (SIGPROF).
"""

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
    """A call took longer than `MOST_S`. No Exception, so that what it interrupts does not take it for its own."""


def limited(call: Callable[[], T]) -> T:
    """What a call gives. Raises TooLong, MemoryError, and what it raises itself.

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
    """Once: to set a handler takes as long as to render a short conversation."""
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
    """Bytes that this process has mapped, looked up once a second."""
    return int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
