"""Where raw records come from: files, folders of files, and the hub."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qdist.core.errors import DataError, MachineError, nearest

Record = dict[str, object]
Located = tuple[str, Record]
"""'file.jsonl:17' or 'file.json, record 3', and the record there."""


def read_records(source: str) -> Iterator[Located]:
    """The records of a file, of a folder of files, or of a hub data set ('owner/name' or 'owner/name:split').

    Raises DataError when the source is missing or empty, or at the first record that cannot be read.
    """
    files = _files(source)
    if files is None:
        return _hub_records(source)
    return (located for path in files for located in _file_records(path))


def check_source(source: str) -> None:
    """Raise DataError now for files that are missing or of an unknown kind; a hub data set is asked for later."""
    _files(source)


def source_digest(source: str) -> str:
    """The sha256 of the files' contents, or of the hub data set's name and revision: equal means equal records."""
    digest = hashlib.sha256()
    files = _files(source)
    if files is None:
        name, split = _hub_name(source)
        digest.update(json.dumps([name, split, _hub_revision(name)]).encode())
        return digest.hexdigest()
    for path in files:
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256")
        digest.update(f"{path.suffix.lower()} {content.hexdigest()}\n".encode())
    return digest.hexdigest()


def _files(source: str) -> list[Path] | None:
    """The files that `source` names, sorted; None when it names a hub data set."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_files(path)
    if path.is_file():
        _reader(path)
        if path.stat().st_size == 0:
            raise DataError(f"{path} holds no record (0 bytes)")
        return [path]
    if _means_a_file(source, path):
        raise _missing(path)
    return None


def _folder_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in _READERS)
    if not files:
        raise DataError(f"{folder} holds no data file", try_=f"files that end in {', '.join(_READERS)}")
    return files


def _means_a_file(source: str, path: Path) -> bool:
    """Whether a name that does not exist was meant as a file rather than as 'owner/name' on the hub."""
    rooted = source.startswith(("/", ".", "~")) or source.count("/") > 1
    in_a_folder = path.parent != Path() and path.parent.is_dir()
    suffixed = path.suffix.lower() in _READERS or ("/" not in source and path.suffix != "")
    return rooted or in_a_folder or suffixed


def _missing(path: Path) -> DataError:
    if not path.parent.is_dir():
        return DataError(f"{path} does not exist, nor does its folder {path.parent}")
    close = nearest(path.name, (sibling.name for sibling in path.parent.iterdir()))
    return DataError(f"{path} does not exist", try_=str(path.with_name(close)) if close else "")


def _reader(path: Path) -> Callable[[Path], Iterator[Located]]:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        told = f"ends in {suffix}" if suffix else "has no suffix"
        raise DataError(f"{path} {told}, so its format is unknown", try_=f"one of {', '.join(_READERS)}")
    return _READERS[suffix]


def _file_records(path: Path) -> Iterator[Located]:
    count = 0
    for located in _reader(path)(path):
        count += 1
        yield located
    if not count:
        raise DataError(f"{path} holds no record ({path.stat().st_size} bytes)")


def _json_records(path: Path) -> Iterator[Located]:
    """A JSON array; a file that starts otherwise is read as JSON lines, which many '.json' files are."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _line_records(path)
        return
    for number, item in enumerate(_parse(text, path, first_line=1), 1):
        where = f"{path}, record {number}"
        yield where, _object(item, where)


def _line_records(path: Path) -> Iterator[Located]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _object(_parse(line, path, first_line=number), where)


def _parse(text: str, path: Path, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{first_line + error.lineno - 1}:{error.colno}"
        reason = error.msg.removesuffix(" at")  # json's own sentence ends with the position
        raise DataError(
            f"{where}: invalid JSON: {reason}", try_="one whole JSON value there, its strings closed"
        ) from error


def _object(item: object, where: str) -> Record:
    if not isinstance(item, dict):
        raise DataError(f"{where}: a record must be a JSON object, not {type(item).__name__}")
    return item


def _text(path: Path) -> str:
    return "".join(_lines(path))


def _lines(path: Path) -> Iterator[str]:
    """Lines end at a newline only: U+2028 and its like may stand inside a JSON string."""
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        try:
            yield from stream
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: {error.reason}", try_="iconv -t UTF-8") from error


def _csv_records(path: Path) -> Iterator[Located]:
    return _table_records(path, delimiter=",")


def _tsv_records(path: Path) -> Iterator[Located]:
    return _table_records(path, delimiter="\t")


def _table_records(path: Path, *, delimiter: str) -> Iterator[Located]:
    rows = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        start = rows.line_num + 1
        for row in rows:
            if row:
                yield f"{path}:{start}", _row(header, row, f"{path}:{start}")
            start = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: {error}") from error


def _row(header: list[str], row: list[str], where: str) -> Record:
    if len(row) != len(header):
        raise DataError(f"{where}: {len(row)} fields, but the header names {len(header)}")
    return dict(zip(header, row, strict=True))


def _parquet_records(path: Path) -> Iterator[Located]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MachineError(f"{path} needs the package pyarrow", try_="pip install pyarrow") from error
    number = 0
    try:
        for batch in ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, record {number}", row
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def _hub_name(source: str) -> tuple[str, str]:
    name, _, split = source.partition(":")
    return name, split or "train"


def _hub_records(source: str) -> Iterator[Located]:
    name, split = _hub_name(source)
    with _hub(name) as datasets:
        rows = datasets.load_dataset(name, split=split)
    for number, row in enumerate(rows, 1):
        yield f"{source}, record {number}", dict(row)


def _hub_revision(name: str) -> str:
    """The commit that the hub, or without network its cache, has of a data set."""
    with _hub(name) as datasets:
        return str(datasets.load_dataset_builder(name).hash)


@contextmanager
def _hub(name: str) -> Iterator[Any]:
    """The package datasets, with what it raises about `name` told as a DataError."""
    try:
        import datasets
    except ImportError as error:
        message = f"{name} is no file here, and the hub needs the package datasets"
        raise MachineError(message, try_="pip install datasets") from error
    try:
        yield datasets
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        message = f"{name} is no file here, and the hub did not give it: {str(error).partition(chr(10))[0]}"
        raise DataError(message, try_="a file or folder, or owner/name:split") from error


_READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".json": _json_records,
    ".jsonl": _line_records,
    ".csv": _csv_records,
    ".tsv": _tsv_records,
    ".parquet": _parquet_records,
}
