"""Draws a chat as its terminal shows it into an SVG: `python bench/chat_picture.py OUT LINE... -- CHAT ARGUMENTS`.

Each LINE is typed once the one before it was answered, and then /quit.
"""

import os
import pty
import re
import select
import sys
import termios
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 104, 40
TIMEOUT_S = 600
PROMPT = "> "
_PARTS = re.compile(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n\b\x07]|[^\x1b\r\n\b\x07]+")


class Screen:
    """The rows of a terminal, as much of one as a chat uses."""

    def __init__(self) -> None:
        self.rows, self._row = [""], 0

    def write(self, text: str) -> None:
        """Show text."""
        for part in _PARTS.findall(text):
            if part == "\n":
                self._row += 1
                self.rows += [""] * (self._row == len(self.rows))
            elif part.startswith("\x1b[") and part.endswith("A"):
                self._row = max(0, self._row - int(part[2:-1]))
            elif part == "\x1b[J":
                del self.rows[self._row :]
                self.rows.append("")
            elif part.endswith("m") and part.startswith("\x1b["):
                self.rows[self._row] += part
            elif part == "\b":
                self.rows[self._row] = self.rows[self._row][:-1]
            elif not part.startswith(("\x1b", "\r", "\x07")):
                self.rows[self._row] += part


def chat(lines: list[str], arguments: list[str]) -> list[str]:
    """The rows that the terminal has in the end."""
    pid, descriptor = pty.fork()
    if pid == 0:
        os.execve(
            sys.executable, [sys.executable, "-m", "qdist", "chat", *arguments],
            os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)},
        )  # fmt: skip
    termios.tcsetwinsize(descriptor, (LINES, COLUMNS))
    screen = Screen()
    for line in [*lines, "/quit"]:
        seen = ""
        while not seen.endswith(PROMPT):
            if not select.select([descriptor], [], [], TIMEOUT_S)[0]:
                raise TimeoutError(f"no prompt within {TIMEOUT_S} s; the terminal shows {screen.rows}")
            more = os.read(descriptor, 65536).decode(errors="replace")
            screen.write(more)
            seen += more
        os.write(descriptor, f"{line}\n".encode())
    try:
        while more := os.read(descriptor, 65536).decode(errors="replace"):
            screen.write(more)
    except OSError:  # Linux's end of a pseudo terminal
        os.waitpid(pid, 0)
    return screen.rows


def main() -> None:
    """Chat, draw, save."""
    split = sys.argv.index("--")
    (out, *lines), arguments = sys.argv[1:split], sys.argv[split + 1 :]
    console = Console(record=True, width=COLUMNS, force_terminal=True, file=StringIO())
    for row in chat(lines, arguments):
        console.print(Text.from_ansi(row), soft_wrap=True)
    flags = [word for word in arguments if word == "--compare"]
    Path(out).write_text(console.export_svg(title=" ".join(["qdist chat", arguments[0], *flags])))


if __name__ == "__main__":
    main()
