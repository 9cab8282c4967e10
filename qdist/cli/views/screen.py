"""A terminal as a screen: single keys without Enter, and drawing only the lines that changed."""

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

from rich.console import Console

from qdist.cli.views.plot import Lines

_CLEAR, _ERASE_REST = "\x1b[2J", "\x1b[K"


class Painter:
    """What a terminal shows now. The alternate screen is up to the caller."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: list[str] = []
        self._size = (0, 0)

    def forget(self) -> None:
        """Something else was drawn: the next screen is sent whole."""
        self._size = (0, 0)

    def draw(self, view: Lines) -> None:
        """Show lines from the top of the terminal; none is wider than it."""
        size = self._console.size
        with self._console.capture() as captured:
            self._console.print(view, end="")
        lines = captured.get().split("\n")
        sent = []
        if (size.width, size.height) != self._size:
            self._size, self._shown = (size.width, size.height), []
            sent.append(_CLEAR)
        for index, (line, text) in enumerate(zip(lines, view.lines, strict=False)):
            if index >= len(self._shown) or self._shown[index] != line:
                # Behind a full line the cursor stands on its last cell, which erasing would take.
                rest = _ERASE_REST if text.cell_len < size.width else ""
                sent.append(f"\x1b[{index + 1};1H{line}{rest}")
        self._shown = lines
        self._console.file.write("".join(sent))
        self._console.file.flush()


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
