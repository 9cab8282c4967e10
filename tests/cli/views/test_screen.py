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
    painter = Painter(console, full=True)
    assert sent(console, painter, "one", "two") == "\x1b[2J\x1b[H\rone\x1b[K\r\ntwo\x1b[K"
    assert sent(console, painter, "one", "three") == "\rthree\x1b[K"
    assert sent(console, painter, "four", "three") == "\r\x1b[1Afour\x1b[K"
    assert sent(console, painter, "four", "three") == ""
    painter.enter()
    assert sent(console, painter, "four", "three").startswith("\x1b[2J\x1b[H\rfour")


def test_a_view_among_printed_lines_gives_way_to_them_and_stays_at_the_end(console: Console) -> None:
    file = console.file
    assert isinstance(file, io.StringIO)
    with Painter(console, full=False) as painter:
        assert file.getvalue() == "\x1b[?25l"
        assert sent(console, painter, "one", "two") == "\rone\x1b[K\r\ntwo\x1b[K"
        painter.clear()
        assert file.getvalue().endswith("two\x1b[K\r\x1b[1A\x1b[J")
        assert sent(console, painter, "one", "two") == "\rone\x1b[K\r\ntwo\x1b[K"
    assert file.getvalue().endswith("two\x1b[K\r\n\x1b[?25h")


@pytest.mark.parametrize(("full", "emptied"), [(True, "\x1b[2J\x1b[H"), (False, "\r\x1b[J")])
def test_a_resize_sends_everything_again(console: Console, full: bool, emptied: str) -> None:
    painter = Painter(console, full=full)
    sent(console, painter, "one")
    console.size = (12, 4)
    assert sent(console, painter, "one") == f"{emptied}\rone\x1b[K"


def test_the_last_cell_of_a_full_line_is_not_erased(console: Console) -> None:
    assert sent(console, Painter(console, full=False), "0123456789") == "\r0123456789"
