"""Does a chat template's own mask of what a model writes, where it has one, agree with what is learned here?

transformers gives it as `return_assistant_tokens_mask`, of templates with `{% generation %}`. Headers of answers, empty
thoughts and white space at the ends may be within that block or outside: a model is given them, or does not write them.
"""

from typing import NamedTuple

from qdist.core.errors import DataError

_SHOWN = 30


class Marked(NamedTuple):
    """The turns up to an answer as the template writes them, with what it marks."""

    text: str
    spans: tuple[tuple[int, ...], ...]
    """Ranges of characters that the template marks as a model's."""

    def marks_before(self, place: int, *, since: int) -> bool:
        """Whether it marks anything but white space between two places."""
        parts = (_cut(span, since, place) for span in self.spans)
        return any(self.text[slice(*part)].strip() for part in parts if part)


def require_same_mask(
    marked: Marked, learned: tuple[int, int], *, since: int, header: int, where: str, turn: int
) -> None:
    """Raise DataError, with the first text that differs, unless the template marks just what is learned of an answer.

    learned: range of characters. since: where the turns begin that are to be compared, behind an earlier answer.
    header: where the answer's own turn begins. turn: number of the answer, counted from 1.
    """
    start, end = learned
    missing = _outside(marked.text, (start, end), marked.spans)
    before = [own for span in marked.spans if (own := _cut(span, since, header))]
    behind = [own for span in marked.spans if (own := _cut(span, end, len(marked.text)))]
    more = next((text for first, last in (*before, *behind) if (text := marked.text[first:last].strip())), "")
    if missing or more:
        what = f"leaves out {missing[:_SHOWN]!r} of" if missing else f"has {more[:_SHOWN]!r} as well as"
        raise DataError(
            f"{where}: the chat template's own mask, by {{% generation %}}, {what} turn {turn} as it is learned here",
            try_="--set data.template=FILE, with that template, its block around the answer and the end of its turn",
        )


def _outside(text: str, part: tuple[int, int], spans: tuple[tuple[int, ...], ...]) -> str:
    """The first stretch of a part that no span covers; empty if that is but white space at its ends."""
    start, end = part
    at = start
    for first, last in sorted((span[0], span[1]) for span in spans):
        if first > at and text[at : min(first, end)].strip() and at < end:
            return text[at : min(first, end)]
        at = max(at, last)
    return text[at:end] if text[at:end].strip() else ""


def _cut(span: tuple[int, ...], least: int, most: int) -> tuple[int, int] | None:
    first, last = max(span[0], least), min(span[1], most)
    return (first, last) if first < last else None
