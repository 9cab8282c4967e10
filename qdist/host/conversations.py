"""The conversations that a data source holds, and what is wrong with its records."""

from collections.abc import Iterable, Iterator
from typing import Any

from qdist.core import demo
from qdist.core.bad_records import BadRecords
from qdist.core.conversation import Conversation
from qdist.core.errors import DataError
from qdist.core.records import conversations
from qdist.host.records import read_records


def read_conversations(source: str, *, data_format: str | None = None) -> Iterator[Conversation | DataError]:
    """The conversations of a source, in order; in place of a record that cannot be used, the reason.

    Raises DataError where the source itself cannot be read.
    """
    if source == demo.NAME:
        located: Iterable[tuple[str, Any]] = (
            (f"demo, record {number}", record) for number, record in enumerate(demo.records(), 1)
        )
    else:
        located = read_records(source)
    for where, record in located:
        if isinstance(record, DataError):
            yield record
            continue
        try:
            found = conversations(record, where=where, data_format=data_format)
        except DataError as error:
            yield error
            continue
        yield from found


def count_conversations(source: str, *, data_format: str | None = None) -> int:
    """How many there are. Raises DataError as `read_conversations` does, and once for all that cannot be used."""
    bad, count = BadRecords(), 0
    for found in read_conversations(source, data_format=data_format):
        if isinstance(found, DataError):
            bad.add(found)
        count += 1
    bad.raise_any(count)
    return count
