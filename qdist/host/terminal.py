"""Terminal output of commands and of their child processes: sanitized, and never failing with a traceback.

Everything goes through `say`: names of files, a model's answers, logs and libraries' messages are others' words.
"""

import io
import os
import re
import shutil
import sys
from collections.abc import Sequence

from qdist.core.errors import JobError, QdistError
from qdist.core.text import fitted, printable

BROKEN_PIPE = 141
"""Exit code of a program whose reader has closed the pipe, as in shells (128 + SIGPIPE)."""
_LONGEST_LINE = 2000
_ERASE = "\r\033[K"
_UNSEEN = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u206f\ufeff]")


_DIM, _PLAIN = "\033[2m", "\033[0m"


def say(text: str = "", *, err: bool = False, end: str = "\n", over: bool = False, dim: bool = False) -> None:
    """Print text without terminal control characters.

    err: to standard error. over: in place of the line that stands there. dim: as an aside, where it is a terminal.
    """
    stream = sys.stderr if err else sys.stdout
    words = printable(text)
    if dim and stream.isatty() and not os.environ.get("NO_COLOR"):
        words = f"{_DIM}{words}{_PLAIN}"
    stream.write((_ERASE if over else "") + words + end)
    stream.flush()


def repaint(lines: Sequence[str], *, above: int) -> None:
    """Print lines in place of the last ones on a terminal. above: how many those are."""
    back = f"\033[{above}A" if above else ""
    sys.stdout.write(f"{back}\r\033[J" + "".join(f"{printable(line)}\n" for line in lines))
    sys.stdout.flush()


def say_json(encoded: bytes) -> None:
    """Print JSON with terminal control characters escaped, which changes no value."""
    say(_UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", encoded.decode()))


def error_text(error: QdistError) -> str:
    """The error, and below it what to try.

    Fitted to standard error where it is a terminal; what may be copied, and a log's lines, stay as they are.
    """
    lines = [_short(line) for line in printable(f"error: {error}").split("\n")]
    if not sys.stderr.isatty():
        return "\n".join(lines)
    width, found = shutil.get_terminal_size().columns, list[str]()
    for line in lines:
        found += [line] if line.startswith(("  | ", "  try: ")) else fitted(line, width, margin=len("error: "))
    return "\n".join(found)


def _short(line: str) -> str:
    more = len(line) - _LONGEST_LINE
    return line if more <= 0 else f"{line[:_LONGEST_LINE]}... ({more:,} more characters)"


def guard_output() -> None:
    """Wrap standard output and error so that writing never fails with a traceback, wherever they lead.

    Closed from the start, they lead nowhere. Where output's reader goes away, the program ends with BROKEN_PIPE; on a
    full disk a JobError is raised. What standard error does not take is lost. Characters that an encoding lacks are
    escaped.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest free number is the closed one's: what is opened later must not get it.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _Output(sys.stdout)
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Guarded(sys.stderr)


class _Guarded(io.TextIOWrapper):
    """A text stream over another's bytes that drops what cannot be written."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._descriptor = stream.fileno()
        super().__init__(
            stream.buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=stream.line_buffering
        )

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        """Redirect to nowhere, so that flushing buffered text does not fail again."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._descriptor)
        os.close(nowhere)


class _Output(_Guarded):
    """A guarded stream whose write failures end the program: a command has nothing else to do."""

    def _fail(self, error: OSError) -> None:
        super()._fail(error)
        if isinstance(error, BrokenPipeError):
            raise SystemExit(BROKEN_PIPE)
        raise JobError(f"standard output cannot be written: {error.strerror}") from error
