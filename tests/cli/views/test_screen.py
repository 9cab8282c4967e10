"""Does a screen arrive whole, and after it only what changed?"""

import io

import pytest
from rich.console import Console
from rich.text import Text

from qdist.cli.views.plot import Lines
from qdist.cli.views.screen import Painter


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setenv("TERM", "xterm")
    return Console(file=io.StringIO(), force_terminal=True, width=10, height=3, color_system=None)


def sent(console: Console, painter: Painter, *lines: str) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    file.seek(0)
    file.truncate()
    painter.draw(Lines([Text(line) for line in lines]))
    return file.getvalue()


def test_the_first_screen_is_sent_whole_and_then_what_changed(console: Console) -> None:
    painter = Painter(console)
    assert sent(console, painter, "one", "two") == "\x1b[2J\x1b[1;1Hone\x1b[K\x1b[2;1Htwo\x1b[K"
    assert sent(console, painter, "one", "three") == "\x1b[2;1Hthree\x1b[K"
    assert sent(console, painter, "one", "three") == ""
    painter.forget()
    assert sent(console, painter, "one", "three").startswith("\x1b[2J\x1b[1;1Hone")


def test_a_resize_sends_everything_again(console: Console) -> None:
    painter = Painter(console)
    sent(console, painter, "one")
    console.size = (12, 4)
    assert sent(console, painter, "one") == "\x1b[2J\x1b[1;1Hone\x1b[K"


def test_the_last_cell_of_a_full_line_is_not_erased(console: Console) -> None:
    assert sent(console, Painter(console), "0123456789") == "\x1b[2J\x1b[1;1H0123456789"
