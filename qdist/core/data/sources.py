"""Which sources does the text of `--data` name, and in which proportions are they mixed? Nothing is opened."""

import re
from collections.abc import Callable, Iterator, Sequence
from math import isfinite

import msgspec

from qdist.core.errors import SpecError, typed

STDIN = "-"
"""Name of standard input."""
_COUNT = re.compile(r"(?P<path>.+)#(?P<number>[0-9][0-9_]*)")
_WEIGHT = re.compile(r"(?P<path>.+):(?P<number>[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?)", re.IGNORECASE)
_UNIT = 10**9
"""Weights are whole numbers of these parts of 1, so that proportions are exact: 0.7 is none in binary."""
_LEAST, _MOST = 1e-6, 1e6
"""Smallest and largest weight."""
_BLOCK = 1000


class SourcePart(msgspec.Struct, frozen=True):
    """One source of records."""

    path: str
    """File, folder, data set by name or hub id, or - for standard input."""
    weight: float | None = None
    """Its share of the samples, in proportion to the others' weights; None to take each record once an epoch."""
    count: int | None = None
    """Number of its records to take, chosen by seed; None for all."""

    def __str__(self) -> str:
        """As typed: 'b.parquet#2000:0.3'."""
        count = "" if self.count is None else f"#{self.count}"
        return f"{self.path}{count}" + ("" if self.weight is None else f":{self.weight:.12g}")


def parse_sources(text: str, exists: Callable[[str], bool] = lambda name: False) -> tuple[SourcePart, ...]:
    """'a.jsonl:0.7,b.parquet#2000:0.3' as its sources.

    exists: whether there is a file or folder of a name, which then is taken as it is: with commas, colons and all.
    Raises SpecError for an empty name, a weight or count that cannot be, and weights that only some have.
    """
    if exists(text) or not text.strip():
        return (SourcePart(text),)
    parts = tuple(_part(entry, exists) for entry in _entries(text, exists))
    unweighted = [part for part in parts if part.weight is None]
    if len(parts) == 1 and parts[0].weight is not None:
        alone = msgspec.structs.replace(parts[0], weight=None)
        raise SpecError(
            f"{parts[0].path} is the only source, so its weight {parts[0].weight:g} has no effect",
            try_=typed("data.path", str(alone)),
        )
    if unweighted and len(unweighted) < len(parts):
        every = [msgspec.structs.replace(part, weight=part.weight or 1.0) for part in parts]
        raise SpecError(
            f"{unweighted[0].path} has no weight, and {len(parts) - len(unweighted)} of {len(parts)} sources have one",
            try_=typed("data.path", written(every)),
        )
    return parts


def written(parts: Sequence[SourcePart]) -> str:
    """Sources as typed after `--data`."""
    return ",".join(map(str, parts))


def _entries(text: str, exists: Callable[[str], bool]) -> Iterator[str]:
    """The text cut at its commas, but for those in names of files that exist."""
    pieces = text.split(",")
    while pieces:
        joined = [(count, ",".join(pieces[:count]).strip()) for count in range(len(pieces), 1, -1)]
        count, entry = next(
            ((count, entry) for count, entry in joined if exists(_part(entry, exists).path)), (1, pieces[0].strip())
        )
        if not entry:
            raise SpecError(f"{text!r} names a source without a name", try_="one comma between two sources")
        yield entry
        pieces = pieces[count:]


def _part(entry: str, exists: Callable[[str], bool]) -> SourcePart:
    weight: float | None = None
    count: int | None = None
    path = entry
    while not exists(path):
        if count is None and (found := _COUNT.fullmatch(path)):
            count = _counted(entry, found["number"])
        elif weight is None and (found := _WEIGHT.fullmatch(path)):
            weight = _weighed(entry, found["number"])
        else:
            break
        path = found["path"]
    return SourcePart(path, weight, count)


def _counted(entry: str, number: str) -> int:
    if not int(number):
        raise SpecError(f"{entry} takes none of its records", try_=f"at least one: {entry.partition('#')[0]}#1")
    return int(number)


def _weighed(entry: str, number: str) -> float:
    weight = float(number)
    if not isfinite(weight) or not _LEAST <= weight <= _MOST:
        raise SpecError(
            f"{entry} has the weight {number}; weights are between {_LEAST:g} and {_MOST:,.0f}",
            try_="leave it out, or give it a weight such as 0.1",
        )
    return weight


def drawn(position: int, weights: Sequence[float]) -> tuple[int, ...]:
    """How many of the first `position` samples of a mixture come from each source.

    Each source's number is its exact share, rounded down; what is left goes to the largest. So in no block of
    `block_of(weights)` samples does any source give a negative number of them.
    """
    whole = [round(weight * _UNIT) for weight in weights]
    counts = [position * weight // sum(whole) for weight in whole]
    counts[whole.index(max(whole))] += position - sum(counts)
    return tuple(counts)


def block_of(weights: Sequence[float]) -> int:
    """Samples in which a mixture keeps its proportions: 1,000, or the square of the number of sources if larger."""
    return max(_BLOCK, len(weights) ** 2)


def epoch_of(sizes: Sequence[int], weights: Sequence[float]) -> int:
    """Samples of an epoch of a mixture: as many as it takes until each source has been used up at least once.

    sizes: samples of each source.
    """
    whole = [round(weight * _UNIT) for weight in weights]
    return max(-(-size * sum(whole) // weight) for size, weight in zip(sizes, whole, strict=True))
