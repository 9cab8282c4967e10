"""How is a message typed: on a line, on several, with editing and history where it is a terminal?"""

import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from qdist.core.errors import MachineError
from qdist.host.files import cache_path, replacing
from qdist.host.terminal import say

_PROMPT, _MORE = "> ", ". "
_QUOTES = '"""'
_MOST_LINES = 1000
"""Lines of history that are kept."""


class Typed:
    """Messages that a person types; on a terminal with readline's editing and a history that only they can read."""

    def __init__(self) -> None:
        self._edits = sys.stdin.isatty() and sys.stdout.isatty() and find_spec("readline") is not None
        self._path = cache_path() / "chat_history"

    def __enter__(self) -> "Typed":
        if self._edits:
            import readline

            readline.set_auto_history(True)
            for line in _lines_of(self._path):
                readline.add_history(line)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._edits:
            _save_history(self._path)

    def message(self) -> str | None:
        """The next message; None at the end of input, or after Ctrl-C at the prompt.

        A line that ends with a backslash goes on in the next, and so do those from a line that begins with three
        quotes to one that ends with them. Ctrl-C within such a message drops it.
        """
        while True:
            try:
                first = input(_PROMPT)
            except (EOFError, KeyboardInterrupt):
                say()
                return None
            try:
                return _whole(first).strip()
            except KeyboardInterrupt:
                say()


def _whole(first: str) -> str:
    """A message from its first line."""
    if first.lstrip().startswith(_QUOTES):
        lines = [first.lstrip().removeprefix(_QUOTES)]
        while not lines[-1].rstrip().endswith(_QUOTES) and (more := _more()) is not None:
            lines.append(more)
        return "\n".join(lines).rstrip().removesuffix(_QUOTES)
    lines = [first]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        if (more := _more()) is not None:
            lines.append(more)
    return "\n".join(lines)


def _more() -> str | None:
    """Another line of the same message; None at the end of input."""
    try:
        return input(_MORE)
    except EOFError:
        say()
        return None


def _lines_of(path: Path) -> list[str]:
    """The history; empty if there is none that can be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-_MOST_LINES:] if path.is_file() else []
    except OSError:
        return []


def _save_history(path: Path) -> None:
    import readline

    count = readline.get_current_history_length()
    lines = [readline.get_history_item(place + 1) for place in range(max(0, count - _MOST_LINES), count)]
    text = "".join(f"{line}\n" for line in lines if line)
    # A cache that cannot be written is told where it is needed: a chat is not.
    with suppress(OSError, MachineError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as (descriptor, _):
            os.fchmod(descriptor, 0o600)
            os.write(descriptor, text.encode("utf-8", "replace"))
