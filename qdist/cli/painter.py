"""Draws one screen after another, and sends only the lines that changed: a run is watched over slow lines too."""

from rich.console import Console

from qdist.cli.plot import Lines

_CLEAR, _ERASE_REST = "\x1b[2J", "\x1b[K"


class Painter:
    """What a terminal shows now. The alternate screen is up to the caller."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: list[str] = []
        self._size = (0, 0)

    def forget(self) -> None:
        """Something else was drawn: the next screen is sent whole."""
        self._size = (0, 0)

    def draw(self, view: Lines) -> None:
        """Show lines from the top of the terminal; none is wider than it."""
        size = self._console.size
        with self._console.capture() as captured:
            self._console.print(view, end="")
        lines = captured.get().split("\n")
        sent = []
        if (size.width, size.height) != self._size:
            self._size, self._shown = (size.width, size.height), []
            sent.append(_CLEAR)
        for index, (line, text) in enumerate(zip(lines, view.lines, strict=False)):
            if index >= len(self._shown) or self._shown[index] != line:
                # Behind a full line the cursor stands on its last cell, which erasing would take.
                rest = _ERASE_REST if text.cell_len < size.width else ""
                sent.append(f"\x1b[{index + 1};1H{line}{rest}")
        self._shown = lines
        self._console.file.write("".join(sent))
        self._console.file.flush()
