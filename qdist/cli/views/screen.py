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

_CLEAR, _ERASE_LINE, _ERASE_BELOW = "\x1b[2J\x1b[H", "\x1b[K", "\x1b[J"


class Painter:
    """A context in which a terminal shows a view.

    full: the view takes the whole terminal, which is put back at the end; otherwise it stands below what was printed,
    and its last lines stay.
    """

    def __init__(self, console: Console, *, full: bool) -> None:
        self._console, self._full = console, full
        self._shown: list[str] = []
        self._size, self._row = (0, 0), 0

    def __enter__(self) -> "Painter":
        self.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def enter(self) -> None:
        """Take the terminal; the next view is sent whole."""
        if self._full:
            self._console.set_alt_screen(True)
        self._console.show_cursor(False)
        self._shown, self._size, self._row = [], (0, 0), 0

    def leave(self) -> None:
        """Restore the terminal, temporarily or for good."""
        if self._full:
            self._console.set_alt_screen(False)
        elif self._shown:
            self._send(self._to(len(self._shown)))
        self._console.show_cursor(True)

    def clear(self) -> None:
        """Take the view away, so that something else can be printed; the next one is sent whole."""
        self._send(self._emptied())

    def draw(self, view: Lines) -> None:
        """Show lines in place of the previous ones; none is wider than the terminal."""
        size = (self._console.size.width, self._console.size.height)
        with self._console.capture() as captured:
            self._console.print(view, end="")
        lines = captured.get().split("\n")[: len(view.lines)]
        sent = []
        if size != self._size or len(lines) < len(self._shown):
            sent.append(self._emptied())
            self._size = size
        for index, (line, text) in enumerate(zip(lines, view.lines, strict=True)):
            if index >= len(self._shown) or self._shown[index] != line:
                # Behind a full line the cursor stands on its last cell, which erasing would take.
                rest = _ERASE_LINE if text.cell_len < size[0] else ""
                sent.append(f"{self._to(index)}{line}{rest}")
        self._shown = lines
        self._send("".join(sent))

    def _emptied(self) -> str:
        """Escape sequence that removes the view and leaves the cursor where it began."""
        sent = _CLEAR if self._full else self._to(0) + _ERASE_BELOW if self._shown else ""
        self._shown, self._size, self._row = [], (0, 0), 0
        return sent

    def _to(self, row: int) -> str:
        """Escape sequence that moves the cursor to the start of a line of the view."""
        down, self._row = row - self._row, row
        return "\r" + ("\n" * down if down >= 0 else f"\x1b[{-down}A")

    def _send(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


class Keys:
    """A context in which keys can be read. Nothing comes where standard input is not a terminal.

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
        """The next key, or '' if none came in time; for an arrow or function key, the whole sequence."""
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
