"""What do the records of a data set come to as tokens, and what in them would a person want to know before training?"""

from collections import Counter
from collections.abc import Sequence

import msgspec


class Piece(msgspec.Struct, frozen=True):
    """A part of a sample's text that is all learned or all given."""

    text: str
    learned: bool


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A sample as training sees it."""

    where: str
    tokens: int
    """0 without a tokenizer."""
    learned: int
    pieces: tuple[Piece, ...]
    cut: int = 0
    """Tokens behind seq_len of its record, which are left out."""


class Bar(msgspec.Struct, frozen=True):
    """Samples whose length is at least `low` and below `high`."""

    low: int
    high: int
    count: int


class SourceSeen(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of one of several sources."""

    name: str
    records: int
    formats: tuple[tuple[str, int], ...]
    """As `Overview.formats`."""
    held_out: bool = False
    """Whether it is evaluated on instead of trained on."""


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """All that was seen of a data set."""

    source: str
    records: int
    whole: bool = True
    """Whether these are all records."""
    samples: int = 0
    formats: tuple[tuple[str, int], ...] = ()
    """How many records are of each format, the most frequent first."""
    sources: tuple[SourceSeen, ...] = ()
    """Each source; there may be one alone."""
    wording: str = ""
    """How records become text."""
    tokenizer: str = ""
    """Whose tokenizer it is; empty if there is none, and lengths are characters."""
    seq_len: int = 0
    shown: tuple[Shown, ...] = ()
    lengths: tuple[Bar, ...] = ()
    median: int = 0
    longest: int = 0
    length: int = 0
    """Tokens of all samples together, once they are cut; characters without a tokenizer."""
    learned: int = 0
    """Of these, how many have a loss."""
    cut: int = 0
    """Records longer than seq_len, which lose their end."""
    cut_median: int = 0
    """Tokens that these lose, in the median."""
    cut_most: int = 0
    dropped: tuple[tuple[str, int], ...] = ()
    """Why records are left out, and how many, where no tokenizer reads them; else notes say it."""
    unread: int = 0
    """Records of which only a chat template tells whether they can be used."""
    duplicates: int = 0
    """Records that say what an earlier one says."""
    first_duplicates: tuple[tuple[str, str], ...] = ()
    """(where, where it was said before)."""
    held_out: int = 0
    overlap: int = 0
    """Held-out samples that say what one says that is trained on."""
    bad: int = 0
    first_bad: tuple[str, ...] = ()
    bad_try: str = ""
    allowed_bad: int = 0
    notes: tuple[str, ...] = ()
    refusal: str = ""
    """Why training would refuse the data although it can use the records; empty if it would not."""
    refusal_try: str = ""

    @property
    def refused(self) -> bool:
        """Whether training would refuse the data."""
        return self.bad > self.allowed_bad or not (self.samples or self.unread) or bool(self.refusal)


_BARS = 12


def histogram(lengths: Sequence[int]) -> tuple[Bar, ...]:
    """At most 12 bars of equal width, a power of two, from the shortest to the longest."""
    if not lengths:
        return ()
    low, high, width = min(lengths), max(lengths), 1
    while high // width - low // width >= _BARS:
        width *= 2
    counts = Counter(length // width for length in lengths)
    return tuple(Bar(at * width, (at + 1) * width, counts[at]) for at in range(low // width, high // width + 1))
