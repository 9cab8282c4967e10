"""How do texts that grow at the same time stand beside each other on a terminal?"""

import re
import shutil
import unicodedata
from collections.abc import Sequence

from qdist.core.text import printable
from qdist.host.terminal import repaint

_GAP = " | "


class Columns:
    """Texts that grow, each in a column of its own.

    Rows that no text can change any more are printed for good; those below are painted again with every change.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        size = shutil.get_terminal_size()
        self._width = (size.columns - 1 - len(_GAP) * (len(labels) - 1)) // len(labels)
        self._most_live = max(1, size.lines - 2)
        self._texts = [""] * len(labels)
        self._ended = [False] * len(labels)
        self._printed = self._live = 0
        repaint([self._row(labels), self._row(["-" * min(self._width, _cells(label)) for label in labels])], above=0)

    def add(self, column: int, text: str) -> None:
        """Lengthen a text."""
        self._texts[column] += printable(text).replace("\t", "    ")
        self._paint()

    def end(self, column: int) -> None:
        """Take note that a text has its full length."""
        self._ended[column] = True
        self._paint()

    def _paint(self) -> None:
        rows = [wrapped(text, self._width) for text in self._texts]
        height = max(map(len, rows))
        final = min((len(own) - 1 for own, ended in zip(rows, self._ended, strict=True) if not ended), default=height)
        lines = [
            self._row([own[row] if row < len(own) else "" for own in rows]) for row in range(self._printed, height)
        ]
        new = max(0, final - self._printed)
        live = lines[new:][-self._most_live :]
        repaint([*lines[:new], *live], above=self._live)
        self._printed, self._live = self._printed + new, len(live)

    def _row(self, parts: Sequence[str]) -> str:
        cut = [_cut(part, self._width) for part in parts]
        return _GAP.join(part + " " * (self._width - _cells(part)) for part in cut).rstrip()


def wrapped(text: str, width: int) -> list[str]:
    """Text as rows of at most `width` cells; words that are longer are broken. More text changes the last row alone."""
    rows = list[str]()
    for line in text.split("\n"):
        row = ""
        for word in re.findall(r"\s+|\S+", line):
            if row.strip() and _cells(row + word) > width:
                rows.append(row.rstrip())
                row = ""
                if word.isspace():
                    continue
            row += word
            while _cells(row) > width:
                head = _cut(row, width)
                rows.append(head)
                row = row[len(head) :]
        rows.append(row)
    return rows


def _cut(text: str, width: int) -> str:
    """The beginning of a text that fits; at least a character."""
    used = 0
    for place, letter in enumerate(text):
        used += _cells(letter)
        if used > width and place:
            return text[:place]
    return text


def _cells(text: str) -> int:
    """Cells that a terminal shows a text in."""
    return sum(
        0
        if unicodedata.combining(letter) or letter in "\u200d\ufe0f"
        else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in text
    )
