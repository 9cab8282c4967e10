"""What a run reads, source by source: all that `--data` and `--eval-data` name, with counts and a seed."""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from qdist.core.data import demo
from qdist.core.data.conversation import Conversation
from qdist.core.data.reading import Reading
from qdist.core.data.records import BadRecords
from qdist.core.data.sources import SourcePart, parse_sources, written
from qdist.core.errors import DataError, SpecError
from qdist.core.planning.plan import DataFacts, Part
from qdist.core.spec.sections import Data
from qdist.host.data import records
from qdist.host.data.text import Located


class DataSource(NamedTuple):
    """One of the sources of a run."""

    part: SourcePart
    held_out: bool = False
    """Whether it is evaluated on instead of trained on."""

    @property
    def name(self) -> str:
        """The source as typed, without weight and count."""
        return self.part.path


def split_sources(text: str) -> tuple[SourcePart, ...]:
    """The sources that a text names; a file or folder with such a name goes before. Raises as `parse_sources` does."""
    return parse_sources(text, _exists)


def sources_of(data: Data) -> tuple[DataSource, ...]:
    """Every source of a run, those that it is evaluated on last. Raises SpecError for weights of the latter."""
    held_out = () if data.eval is None else split_sources(data.eval)
    for part in held_out:
        if part.weight is not None:
            raise SpecError(
                f"{part.path} has the weight {part.weight:g}, and every sample is evaluated on once",
                try_=f"--eval-data {part.path}",
            )
    return (*map(DataSource, split_sources(data.path)), *(DataSource(part, held_out=True) for part in held_out))


def unweighted(text: str) -> str:
    """The sources that a text names without their weights, where each record is read once."""
    parts = [msgspec.structs.replace(part, weight=None) for part in split_sources(text)]
    return written(parts)


def check_data(data: Data) -> None:
    """Raise DataError for problems visible at the beginnings of files; data sets on a hub are checked later."""
    for source in sources_of(data):
        records.check_source(source.name)


def data_notes(data: Data) -> tuple[str, ...]:
    """What is read of folders, and what known names stand for."""
    return tuple(dict.fromkeys(note for source in sources_of(data) for note in records.source_notes(source.name)))


def is_local(data: Data) -> bool:
    """Whether all of it can be read without asking a hub."""
    return all(records.is_local(source.name) for source in sources_of(data))


def hub_ids(text: str) -> tuple[str, ...]:
    """Hub ids of the sources that a text names, those behind known names included; files have none."""
    return tuple(dict.fromkeys(filter(None, (records.hub_id(part.path) for part in split_sources(text)))))


def digests_of(data: Data) -> tuple[str, ...]:
    """`source_digest` of each source; empty for the demo, and for one on a hub, which would have to be asked."""
    names = [source.name for source in sources_of(data)]
    return tuple(records.source_digest(name) if name != demo.NAME and records.is_local(name) else "" for name in names)


def digest_over(digests: tuple[str, ...]) -> str:
    """One digest for all sources: that of the only one, or of all that have one; empty if none has."""
    if len(digests) == 1 or not any(digests):
        return digests[0] if digests else ""
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def changed_sources(data: Data, then: DataFacts) -> tuple[str, ...]:
    """Names of sources that are known to hold other records than when they were tokenized."""
    now = digests_of(data)
    if len(now) == len(then.parts):
        both = zip(then.parts, now, strict=True)
        return tuple(part.name for part, digest in both if part.digest and digest not in ("", part.digest))
    return (data.path,) if then.digest and digest_over(now) not in ("", then.digest) else ()


def read_source(source: DataSource, reading: Reading, *, seed: int) -> Iterator[Conversation | DataError]:
    """The conversations of one source, in order, with the reason in place of each record that cannot be used.

    seed: chooses the records, where the source has a count. Raises DataError if the source itself cannot be read.
    """
    own = records.reading_for(source.name, reading)
    return records.conversations_in(_counted(source.part, seed), own)


def count_records(data: Data, reading: Reading, *, seed: int) -> tuple[int, ...]:
    """Number of usable conversations of each source.

    Raises DataError if a source cannot be read, and once for all unusable records if they are more than
    `data.skip_bad`.
    """
    bad, counts = BadRecords(), list[int]()
    for source in sources_of(data):
        good = 0
        for found in read_source(source, reading, seed=seed):
            if isinstance(found, DataError):
                bad.add(found)
            else:
                good += 1
        counts.append(good)
    bad.raise_any(sum(counts) + bad.count, allowed=data.skip_bad)
    return tuple(counts)


def parts_of(sources: Sequence[DataSource], firsts: Sequence[int], digests: Sequence[str] = ()) -> tuple[Part, ...]:
    """Sources with the samples that each has. firsts: index of the first sample of each, and the number of samples."""
    return tuple(
        Part(
            name=source.name,
            first=first,
            samples=stop - first,
            weight=source.part.weight,
            held_out=source.held_out,
            digest=digest,
        )
        for source, (first, stop), digest in zip(
            sources, pairwise(firsts), digests or ("",) * len(sources), strict=True
        )
    )


def _counted(part: SourcePart, seed: int) -> Iterator[Located]:
    """The records of a source, or as many as are wanted of it, in their order.

    They are read twice then: which ones are taken depends on how many there are.
    """
    if part.count is None:
        return records.read_records(part.path)
    total = sum(1 for _ in records.read_records(part.path))
    if total < part.count:
        raise DataError(
            f"{part.path} has {total:,} records, and {part.count:,} are asked for", try_=f"--data {part.path}#{total}"
        )
    chosen = frozenset(random.Random(f"{seed} {total}").sample(range(total), part.count))
    return (located for number, located in enumerate(records.read_records(part.path)) if number in chosen)


def _exists(name: str) -> bool:
    return name == demo.NAME or os.path.lexists(os.path.expanduser(name))
