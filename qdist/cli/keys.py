"""Single keys from a terminal, without Enter; the terminal is left as it was found."""

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Keys:
    """A context in which keys can be read. Nothing comes where standard input is no terminal.

    leave, come_back: called around a Ctrl-Z.
    """

    def __init__(
        self, *, leave: Callable[[], None] = lambda: None, come_back: Callable[[], None] = lambda: None
    ) -> None:
        self._leave, self._come_back = leave, come_back
        self._descriptor = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._before: list[Any] = []
        self._handler: Any = None

    def __enter__(self) -> "Keys":
        if self._descriptor is not None:
            self._before = termios.tcgetattr(self._descriptor)
            tty.setcbreak(self._descriptor)
            self._handler = signal.signal(signal.SIGTSTP, self._suspend)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            signal.signal(signal.SIGTSTP, self._handler)
            self._restore()

    def wait(self, seconds: float) -> str:
        """The next key, or '' when none came in time; of an arrow or function key, the whole sequence."""
        if self._descriptor is None:
            time.sleep(seconds)
            return ""
        ready, _, _ = select.select([self._descriptor], [], [], seconds)
        if not ready:
            return ""
        typed = os.read(self._descriptor, 32)
        if not typed:
            raise EOFError
        return typed.decode(errors="replace")

    def _restore(self) -> None:
        if self._descriptor is not None:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        self._leave()
        self._restore()
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._descriptor is not None:
            tty.setcbreak(self._descriptor)
        self._come_back()
