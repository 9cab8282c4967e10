"""Records in tables: CSV and TSV, Parquet, Arrow."""

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from qdist.core.errors import DataError, MachineError
from qdist.host.data.text import FIELDS, Located, Record, beside, lines
from qdist.host.opening import told

DELIMITERS = (",", "\t", ";", "|")
_NAME = re.compile(r"[\w.-]{1,40}")
_LONGEST_FIELD = 1 << 30
_ROWS = 1024
"""Rows of a Parquet or Arrow file that are converted to Python objects at a time."""


def delimiter_of(header: str, *, usual: str) -> str:
    """The delimiter of a header's fields: the usual one, or if no field has it, the one that occurs."""
    counts = {delimiter: len(_fields(header, delimiter)) for delimiter in (usual, *DELIMITERS)}
    return usual if counts[usual] > 1 else max(counts, key=lambda delimiter: counts[delimiter])


def told_delimiter(header: str) -> str | None:
    """The delimiter of a line that is certainly a header, or None: plain text contains commas too."""
    for delimiter in DELIMITERS:
        names = [name.strip() for name in _fields(header, delimiter)]
        if len(names) > 1 and all(map(_NAME.fullmatch, names)) and FIELDS & {name.lower() for name in names}:
            return delimiter
    return None


def _fields(header: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error:
        return []


def csv_records(path: Path, *, delimiter: str) -> Iterator[Located]:
    """One record per row, keyed by the header; a row with a different number of fields is reported in its place."""
    csv.field_size_limit(_LONGEST_FIELD)  # the module's own limit is 131,072 characters, which documents exceed
    rows = csv.reader(lines(path), delimiter=delimiter, strict=True)
    try:
        header = _header(path, next((row for row in rows if row), []))
    except csv.Error as error:
        raise _csv_error(f"{path}:{rows.line_num}", error, path) from error
    while True:
        where = f"{path}:{rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield where, _csv_error(where, error, path)
            continue
        if row is None:
            return
        if row:
            yield where, _row(header, row, where)


def _csv_error(where: str, error: csv.Error, path: Path) -> DataError:
    if "new-line character" in str(error):
        return DataError(f"{where}: a carriage return ends a line there", try_=_newlines(path))
    reason = f"{error}: a quote is not closed" if "unexpected end" in str(error) else str(error)
    return DataError(f"{where}: {reason}", try_='a quote inside a quoted field is written ""')


def _newlines(path: Path) -> str:
    return f"tr '\\r' '\\n' < {quote(str(path))} > {beside(path, 'newlines')}"


def _header(path: Path, row: list[str]) -> list[str]:
    names = [name.strip() or f"column {number}" for number, name in enumerate(row, 1)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: the header names {', '.join(twice)} twice", try_="another name for one of them")
    return names


def _row(header: list[str], row: list[str], where: str) -> Record | DataError:
    if len(row) != len(header):
        message = f"{where}: {len(row)} fields, but the header names {len(header)}"
        return DataError(message, try_="quotes around a field that holds the delimiter")
    if any("\0" in field for field in row):
        return DataError(f"{where}: a NUL byte")
    return dict(zip(header, row, strict=True))


def parquet_records(path: Path) -> Iterator[Located]:
    """The rows of a Parquet file, one batch in memory at a time."""
    with _arrow(path, "Parquet"):
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            yield from _rows(path, file.iter_batches(batch_size=_ROWS))


def arrow_records(path: Path, *, stream: bool) -> Iterator[Located]:
    """The rows of an Arrow file, or of an Arrow stream as datasets' `save_to_disk` writes it."""
    with _arrow(path, "Arrow") as arrow, arrow.memory_map(str(path)) as source:
        if stream:
            yield from _rows(path, arrow.ipc.open_stream(source))
        else:
            file = arrow.ipc.open_file(source)
            yield from _rows(path, map(file.get_batch, range(file.num_record_batches)))


@contextmanager
def _arrow(path: Path, form: str) -> Iterator[Any]:
    """The pyarrow package, with its errors about a file raised as DataError."""
    try:
        import pyarrow
    except ImportError as error:
        raise MachineError(f"{path} needs the package pyarrow", try_="pip install pyarrow") from error
    with told(f"{path} is not a readable {form} file", DataError, try_="fetch it again"):
        yield pyarrow


def _rows(path: Path, batches: Iterator[Any]) -> Iterator[Located]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # Arrow trusts offsets that it reads, and would follow damaged ones out of the file
        twice = sorted({name for name in batch.schema.names if batch.schema.names.count(name) > 1})
        if twice:
            raise DataError(f"{path} has columns {', '.join(twice)} twice", try_="another name for one of them")
        for start in range(0, len(batch), _ROWS):
            for row in batch.slice(start, _ROWS).to_pylist():
                number += 1
                yield f"{path}, record {number}", row
