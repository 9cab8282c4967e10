"""Breaks long lines between words for a terminal, which would break them anywhere."""

import textwrap

_LEAST = 40


def fitted(line: str, width: int, *, margin: int) -> list[str]:
    """A line as lines of `width` cells; all but the first begin with a margin. Words stay whole, paths too."""
    return textwrap.wrap(
        line, max(_LEAST, width), subsequent_indent=" " * margin, break_long_words=False, break_on_hyphens=False
    ) or [line]  # fmt: skip
