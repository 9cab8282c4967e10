"""Does an error fit the terminal that it is said to?"""

import io
import sys

import pytest

from qdist.core.errors import SpecError
from qdist.host.terminal import error_text


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
