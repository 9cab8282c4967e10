"""Texts that grow stand in columns, and rows that are final are printed once."""

import os
import re
import shutil

import pytest

from qdist.host.columns import Columns, _cells, wrapped


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("", [""]),
        ("one two three", ["one two", "three"]),
        ("one two \nthree", ["one two ", "three"]),
        ("abcdefghijklm", ["abcdefgh", "ijklm"]),
        ("a abcdefghijklm", ["a", "abcdefgh", "ijklm"]),
        ("  indented", ["  indent", "ed"]),
        ("日本語日本語", ["日本語日", "本語"]),
        ("a\n\nb", ["a", "", "b"]),
        ("e\u0301" * 9, ["e\u0301" * 8, "e\u0301"]),
    ],
)
def test_text_is_wrapped_by_cells(text: str, rows: list[str]) -> None:
    assert wrapped(text, 8) == rows
    assert all(_cells(row) <= 8 for row in rows)


def test_more_text_changes_the_last_row_alone() -> None:
    text = "The quick brown fox, who jumps over lazy dogs;\n  indented words and incomprehensibilities\n\n日本 ends"
    for width in (1, 5, 8, 20):
        for length in range(len(text)):
            before, after = wrapped(text[:length], width), wrapped(text[: length + 1], width)
            assert after[: len(before) - 1] == before[:-1]


class Screen:
    """What a terminal shows of text that moves up and erases below."""

    def __init__(self) -> None:
        self.rows = [""]

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b\[\d*[AJ]|\r|\n|[^\x1b\r\n]+", text):
            if part.endswith("A") and part.startswith("\x1b"):
                self.place = len(self.rows) - 1 - int(part[2:-1])
            elif part == "\x1b[J":
                del self.rows[getattr(self, "place", len(self.rows) - 1) :]
                self.rows.append("")
                self.place = len(self.rows) - 1
            elif part == "\n":
                self.rows.append("")
                self.place = len(self.rows) - 1
            elif part != "\r":
                self.rows[-1] += part


@pytest.mark.parametrize("height", [24, 4])
def test_columns_end_as_both_texts_beside_each_other(
    height: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((24, height)))
    screen = Screen()
    columns = Columns(["base", "run"])
    for word in ("one ", "two ", "three ", "four ", "five ", "six ", "seven"):
        columns.add(0, word)
        screen.write(capsys.readouterr().out)
    columns.add(1, "short\x1b[2J\ttext")
    columns.end(1)
    columns.end(0)
    screen.write(capsys.readouterr().out)
    assert screen.rows == [
        "base       | run", "----       | ---", "one two    | short", "three four | text", "five six   |",
        "seven      |", "",
    ]  # fmt: skip
