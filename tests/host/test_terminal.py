"""Does an error fit the terminal that it is said to?"""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qdist
from qdist.core.errors import SpecError
from qdist.host.terminal import BROKEN_PIPE, error_text, say, say_json

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(qdist.__file__).parents[1])}


class Terminal(io.StringIO):
    """Standard error as a person sees it."""

    def isatty(self) -> bool:
        return True


def test_an_error_fits_a_terminal_and_its_command_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    error = SpecError("a sentence of so many words " * 2, try_="qdist launch --resume --run runs/of-a-long-name")
    plain = error_text(error)
    assert plain == f"error: {error}"
    monkeypatch.setattr(sys, "stderr", Terminal())
    shown = error_text(error)
    assert shown.split() == plain.split()
    assert "\n       " in shown
    assert shown.endswith(f"\n  try: {error.try_}")


def test_an_error_controls_no_terminal_and_has_an_end() -> None:
    shown = error_text(SpecError("no file \x1b[2J\u202egnp.exe\r" + "x" * 9000, try_="\x1b]0;t\x07ls"))
    first, second = shown.split("\n")
    assert first.startswith("error: no file  gnp.exe xxx")
    assert first.endswith("x... (7,024 more characters)")
    assert second == "  try: ls"


def test_what_is_said_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[2Jb")
    say("c\r", err=True, end="")
    say_json('{"a":"\x9b\u202e\u00e9"}'.encode())
    assert capsys.readouterr() == ('ab\n{"a":"\\u009b\\u202e\u00e9"}\n', "c ")


def test_everything_is_printed_by_one_function() -> None:
    """Ranks print to their own logs."""
    package = Path(qdist.__file__).parent
    printing = re.compile(r"(?<![\w.])print\(|click\.echo\(|std(out|err)\.write\(")
    found = {str(file.relative_to(package)) for file in package.rglob("*.py") if printing.search(file.read_text())}
    assert found <= {"host/terminal.py", "cli/views/text.py", "runtime/train/rank.py", "runtime/train/worker.py"}


@pytest.mark.parametrize(
    ("words", "redirection", "code", "said"),
    [
        ("--help", ">/dev/full", 1, "error: standard output cannot be written: No space left on device\n"),
        ("runs .", ">/dev/full", 1, "error: standard output cannot be written: No space left on device\n"),
        ("runs .", ">&-", 0, ""),
        ("runs nowhere", "2>/dev/full", 2, ""),
        ("runs nowhere", "2>&-", 2, ""),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(
    words: str, redirection: str, code: int, said: str, tmp_path: Path
) -> None:
    command = f"exec {sys.executable} -m qdist {words} {redirection}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_reader_that_goes_away_ends_a_program_without_a_word(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "qdist", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, b"")
