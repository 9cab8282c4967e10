"""Compressed files are read as they are, and plain text is one document."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from qdist.core.errors import DataError
from qdist.host.data import files
from qdist.host.data.compressed import COMPRESSIONS, can_read
from qdist.host.data.files import check_file, file_records, form_of

LINES = b'{"text": "one \xc3\xa9"}\n{"text": "two"}\n'
CSV = b"input,output\na,b\n"


@pytest.mark.parametrize(
    ("name", "content", "records"),
    [
        ("d.jsonl", LINES, [{"text": "one é"}, {"text": "two"}]),
        ("d", LINES, [{"text": "one é"}, {"text": "two"}]),
        ("d.json", b'[{"text": "a"},\n{"text": "b"}]', [{"text": "a"}, {"text": "b"}]),
        ("d.csv", CSV, [{"input": "a", "output": "b"}]),
        ("d.tsv", CSV.replace(b",", b"\t"), [{"input": "a", "output": "b"}]),
        ("d.txt", b"A text,\nno records.\n", [{"text": "A text,\nno records.\n"}]),
        ("d.jsonl", LINES.decode().encode("utf-16"), [{"text": "one é"}, {"text": "two"}]),
    ],
)
@pytest.mark.parametrize(
    ("compress", "suffix"), [(gzip.compress, ".gz"), (bz2.compress, ".bz2"), (lzma.compress, ".xz")]
)
def test_a_compressed_file_holds_the_records_of_what_was_compressed(
    tmp_path: Path,
    name: str,
    content: bytes,
    records: list[dict[str, str]],
    compress: Callable[[bytes], bytes],
    suffix: str,
) -> None:
    plain, packed = tmp_path / name, tmp_path / f"{name}{suffix}"
    plain.write_bytes(content)
    packed.write_bytes(compress(content))
    check_file(packed)
    assert form_of(packed) == form_of(plain)
    assert [record for _, record in file_records(packed)] == [record for _, record in file_records(plain)] == records


def test_records_of_compressed_lines_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(LINES + b"5\n"))
    assert [where for where, _ in file_records(path)] == [f"{path}:{number}" for number in (1, 2, 3)]


@pytest.mark.parametrize("cut", [3, 20, -4])
def test_a_damaged_compressed_file_is_told_as_one(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(LINES * 99)[:cut])
    with pytest.raises(DataError, match="is damaged: gzip cannot decompress it"):
        list(file_records(path))


def test_a_byte_that_is_no_text_is_found_in_what_was_compressed(tmp_path: Path) -> None:
    path = tmp_path / "d.csv.gz"
    path.write_bytes(gzip.compress(b"input,output\na,\xe9\n"))
    with pytest.raises(DataError, match="byte 0xe9 at position 15, in line 2"):
        list(file_records(path))


def test_zstd_is_read_where_python_has_it() -> None:
    known = {each.name: can_read(each) for each in COMPRESSIONS}
    assert {name for name, reads in known.items() if reads} >= {"gzip", "xz", "bzip2"}


@pytest.mark.parametrize(
    ("content", "kind"),
    [("A text, of words.\n", "text"), ('{"text": "a"}\n', "json"), ("input,output\na,b\n", "table"), ("5\n", "text")],
)
def test_text_is_a_document_unless_it_holds_records(tmp_path: Path, content: str, kind: str) -> None:
    path = tmp_path / "d.txt"
    path.write_text(content)
    assert form_of(path).kind == kind


def test_a_long_text_is_several_documents_each_up_to_the_end_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LONGEST_TEXT", 8)
    path = tmp_path / "d.txt"
    path.write_text("one two three\nfour\nfive and one line of words\n")
    located = [(where.removeprefix(str(path)), record) for where, record in file_records(path)]
    assert located == [
        ("", {"text": "one two three\n"}),
        (", part 2", {"text": "four\nfive and on"}),
        (", part 3", {"text": "e line of words\n"}),
    ]
