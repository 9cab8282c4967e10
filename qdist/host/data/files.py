"""What format a data file is in, judged by its contents, and the reader for it."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from shlex import quote
from typing import Literal, NamedTuple

from qdist.core.errors import DataError
from qdist.host.data.compressed import Compression, bare_name, can_read, compression_of, open_bytes
from qdist.host.data.json_records import holds_json, json_records
from qdist.host.data.tables import arrow_records, csv_records, delimiter_of, parquet_records, told_delimiter
from qdist.host.data.text import Located, from_encoding, lines, open_text
from qdist.host.opening import UTF8, encoding_of, readable

READ = "JSON, JSON lines, CSV, TSV, Parquet or Arrow"
PLAIN_TEXT = ".txt"
"""Suffix of plain text, which is one document, unless it holds records."""
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, ".parquet", ".arrow")
"""Suffixes that mark a data file without looking into it."""

_HEAD_BYTES = 1 << 16
_MOST_BAD = 1000
"""Number of bad records after which a file without a single good one is given up."""
_LONGEST_TEXT = 1 << 20
"""Characters of a plain text that are one document. Tokenizing one takes 150 times as many bytes."""
_CHECKED_BYTES = 4 << 20
"""Largest text file, in bytes, whose first record is read before anything starts: a JSON object must be read whole."""

_MAGIC: tuple[tuple[bytes, Literal["parquet", "arrow", "arrow-stream"]], ...] = (
    (b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow-stream"),
)  # fmt: skip
_FOREIGN = (
    (b"\x89HDF", "an HDF5 file"), (b"SQLite format 3\0", "an SQLite database"), (b"%PDF", "a PDF document"),
    (b"\x93NUMPY", "a NumPy array"), (b"PARE", "an encrypted Parquet file"), (b"FEA1", "a Feather file of version 1"),
    (b"ORC", "an ORC file"), (b"Obj\x01", "an Avro file"), (b"7z\xbc\xaf", "a 7z archive"), (b"Rar!", "a RAR archive"),
)  # fmt: skip
_ARCHIVE = re.compile(r"\.(tar(\.\w+)?|tgz)$")
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_MOST_CONTROL = 0.05
"""Share of control bytes at which a file counts as binary instead of text with a damaged spot."""
_SURE_JSON = re.compile(r'\s*(\{\s*["}]|\[\s*[{"\[\]])')


class Form(NamedTuple):
    """The format in which a file holds its records."""

    kind: Literal["json", "table", "parquet", "arrow", "arrow-stream", "text"]
    delimiter: str = ""
    """What separates the fields of a table."""


def form_of(path: Path) -> Form:
    """The format of a data file. Raises DataError if it is not supported, saying what it is and what to run."""
    head = _head(path)
    if not head.strip() and len(head) < _HEAD_BYTES:
        raise DataError(f"{path} holds no record ({path.stat().st_size} bytes)", try_="a file with records")
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            _refuse_compressed(path, kind)
            if kind != "arrow-stream":
                _check_end(path, kind)
            return Form(kind)
    _refuse_foreign(path, head)
    text, suffix = _decoded(head), bare_name(path).suffix.lower()
    if suffix in TABLE_SUFFIXES and not _SURE_JSON.match(text):
        return Form("table", delimiter_of(_first_line(text), usual="\t" if suffix == ".tsv" else ","))
    bracket = suffix in JSON_SUFFIXES and text.lstrip()[:1] in ("{", "[")
    if suffix in TABLE_SUFFIXES or bracket or _holds_json(head):
        return Form("json")
    if delimiter := told_delimiter(_first_line(text)):
        return Form("table", delimiter)
    if suffix in JSON_SUFFIXES:
        return Form("json")
    if suffix == PLAIN_TEXT:
        return Form("text")
    raise _no_form(path, text)


def file_records(path: Path) -> Iterator[Located]:
    """The records of a data file, with an error in place of each one that cannot be read.

    Raises DataError if the file cannot be read as a whole, holds no record, or none that is good.
    """
    located, bad = _located(path, form_of(path)), list[Located]()
    for item in located:
        if not isinstance(item[1], DataError):
            break
        bad.append(item)
        if len(bad) == _MOST_BAD:
            raise _none_good(path, bad)
    else:
        raise _none_good(path, bad)
    yield from bad
    yield item
    yield from located


def check_file(path: Path) -> None:
    """Raise DataError for problems visible at the file's beginning and end, without reading Parquet or Arrow."""
    form = form_of(path)
    if form.kind == "table" or (form.kind == "json" and path.stat().st_size <= _CHECKED_BYTES):
        next(file_records(path))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes and format: equal means equal records, whatever the file's name."""
    refuse_special(path)
    with readable(path, DataError), path.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    form = Form("json")
    with suppress(DataError):  # reading tells it better
        form = form_of(path)
    return f"{form.kind} {form.delimiter} {content}"


def holds_records(path: Path) -> bool:
    """Whether a file of prompts holds records rather than one prompt per line. Raises DataError if it is neither."""
    head = _head(path)
    if any(head.startswith(magic) for magic, _ in _MAGIC):
        return True
    _refuse_foreign(path, head)
    return bare_name(path).suffix.lower() in SUFFIXES or _holds_json(head)


def is_plain_text(source: str) -> bool:
    """Whether a name is that of a `.txt` file: plain text without records."""
    path = Path(source).expanduser()
    return bare_name(path).suffix.lower() == PLAIN_TEXT and path.is_file() and not holds_records(path)


def read_text_lines(path: Path) -> list[tuple[str, str]]:
    """('prompts.txt:3', the line without its newline) for every line, blank ones too. Raises DataError for no text."""
    _refuse_foreign(path, _head(path))
    return [
        (f"{path}:{number}", line.removesuffix("\n").removesuffix("\r")) for number, line in enumerate(lines(path), 1)
    ]


def refuse_special(path: Path) -> None:
    """Raise DataError for a pipe or device, which would block or be empty when read a second time."""
    if path.exists() and not path.is_file():
        raise DataError(
            f"{path} is not a regular file, and data is read more than once", try_="write it to a file first"
        )


def _located(path: Path, form: Form) -> Iterator[Located]:
    match form.kind:
        case "json":
            return json_records(path)
        case "table":
            return csv_records(path, delimiter=form.delimiter)
        case "parquet":
            return parquet_records(path)
        case "text":
            return _documents(path)
        case _:
            return arrow_records(path, stream=form.kind == "arrow-stream")


def _documents(path: Path) -> Iterator[Located]:
    """A plain text as one record; a longer one as several, each up to the end of a line."""
    with open_text(path) as stream:
        for number in count(1):
            if not (text := stream.read(_LONGEST_TEXT)):
                return
            if len(text) == _LONGEST_TEXT:
                text += stream.readline(_LONGEST_TEXT)
            yield f"{path}, part {number}" if number > 1 else str(path), {"text": text}


def _none_good(path: Path, bad: list[Located]) -> DataError:
    errors = [error for _, error in bad if isinstance(error, DataError)]
    if not errors:
        return DataError(f"{path} holds no record ({path.stat().st_size} bytes)", try_="a file with records")
    if len(errors) == 1:
        return errors[0]
    told = f"{path} is no file of records: none of its first {len(errors)} can be read"
    return DataError(f"{told}; the first: {errors[0].message}", try_=errors[0].try_)


def _head(path: Path) -> bytes:
    refuse_special(path)
    _refuse_packed(path)
    with open_bytes(path) as stream:
        return stream.read(_HEAD_BYTES)


def _refuse_compressed(path: Path, kind: str) -> None:
    """Parquet and Arrow are read by offset, which a compressed file does not have."""
    if compression := compression_of(path):
        raise DataError(
            f"{path} is {kind.capitalize()} compressed with {compression.name}, and cannot be read by offset",
            try_=_unpacking(path, compression),
        )


def _check_end(path: Path, kind: str) -> None:
    form, magic = {"parquet": ("Parquet", b"PAR1"), "arrow": ("Arrow", b"ARROW1")}[kind]
    with readable(path, DataError), path.open("rb") as stream:
        stream.seek(max(len(magic), path.stat().st_size - len(magic)))
        if stream.read() != magic:
            raise DataError(f"{path} is not a readable {form} file: its end is missing", try_="fetch it again")


def _refuse_foreign(path: Path, head: bytes) -> None:
    _refuse_archive(path, head)
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise DataError(f"{path} is {what}, not {READ}", try_="write its records as JSON lines")
    start = head.lstrip()[:40].lower()
    if start.startswith(b"version https://git-lfs"):
        pull = f"git -C {quote(str(path.parent))} lfs pull"
        raise DataError(f"{path} is a pointer of Git LFS, without the data itself", try_=pull)
    if start.startswith((b"<!doctype html", b"<html")):
        raise DataError(
            f"{path} is a web page, not the data", try_="the address of the file itself (/resolve/, not /blob/)"
        )
    if encoding_of(head) == UTF8:
        _refuse_binary(path, head)


def _refuse_packed(path: Path) -> None:
    """Refuse compressions that are not read here, and archives of several files."""
    compression = compression_of(path)
    archive = compression is not None and _ARCHIVE.search(path.name)
    if compression is not None and (archive or not can_read(compression)):
        unpack = f"tar -xf {quote(str(path))}" if archive else _unpacking(path, compression)
        raise DataError(f"{path} is compressed with {compression.name}", try_=unpack)


def _unpacking(path: Path, compression: Compression) -> str:
    """A command that decompresses a file, and keeps it."""
    name, out = quote(str(path)), quote(str(path.with_name(f"{path.name}.unpacked")))
    there = path.suffix == compression.suffix
    return f"{compression.unpack} -k {name}" if there else f"{compression.unpack} < {name} > {out}"


def _refuse_archive(path: Path, head: bytes) -> None:
    name = quote(str(path))
    if head.startswith(b"PK\x03\x04"):
        sheet = path.suffix.lower() in (".xlsx", ".ods")
        what, command = ("spreadsheet", "save it as CSV in UTF-8") if sheet else ("zip archive", f"unzip {name}")
        raise DataError(f"{path} is a {what}", try_=command)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        name, out = (json.dumps(str(file), ensure_ascii=False) for file in (path, path.with_suffix(".jsonl")))
        frame = f"pandas.DataFrame(pandas.read_pickle({name}))"
        code = f'import pandas; {frame}.to_json({out}, orient="records", lines=True)'
        message = f"{path} is a Python pickle, which may run code as it is read, so convert it only if you trust it"
        raise DataError(message, try_=f"python3 -c {quote(code)}")


def _refuse_binary(path: Path, head: bytes) -> None:
    odd, even = head[1::2].count(0), head[::2].count(0)
    if max(odd, even) * 10 > len(head) and max(odd, even) > 10 * min(odd, even):
        encoding = "UTF-16LE" if odd > even else "UTF-16BE"
        raise DataError(f"{path} is {encoding} without a byte order mark", try_=from_encoding(path, encoding))
    control = 0 if head.lstrip()[:1] in (b"{", b"[") else len(_CONTROL.findall(head))
    if control > _MOST_CONTROL * len(head):
        share = f"{control} of its first {len(head)} bytes are control bytes such as NUL"
        raise DataError(f"{path} is binary, not {READ}: {share}", try_="write its records as JSON lines")


def _holds_json(head: bytes) -> bool:
    return holds_json(_decoded(head), whole=len(head) < _HEAD_BYTES)


def _decoded(head: bytes) -> str:
    return head.decode(encoding_of(head), errors="replace")


def _first_line(text: str) -> str:
    return text.lstrip("\r\n \t").partition("\n")[0]


def _no_form(path: Path, text: str) -> DataError:
    start = _first_line(text)[:40].rstrip()
    if path.suffix.lower() in (".parquet", ".arrow"):
        form = path.suffix[1:].capitalize()
        return DataError(f"{path} is not a readable {form} file: it starts with {start!r}", try_="fetch it again")
    return DataError(
        f"{path} is text that starts with {start!r}, not {READ}", try_='one JSON object a line, such as {"text": "..."}'
    )
