"""Breaks long lines between words for a terminal, which would break them anywhere."""

import textwrap

_LEAST = 30
"""Cells beside a margin: where a terminal has fewer, it is left to break lines itself."""


def fitted(line: str, width: int, *, margin: int = 0) -> list[str]:
    """A line as lines of `width` cells; all but the first begin with a margin. Words stay whole, paths too."""
    width = max(width, margin + _LEAST if margin else 1)
    indent = " " * margin
    return textwrap.wrap(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [line]  # fmt: skip
