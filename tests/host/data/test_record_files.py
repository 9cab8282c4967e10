"""A data file is told by what is in it, and whatever is in it ends in records or in sentences."""

import gzip
import io
import json
import pickle
import random
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qdist.core.errors import DataError
from qdist.host.data import json_records
from qdist.host.data.files import check_file, file_digest, file_records, form_of, holds_records, read_text_lines

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [{"prompt": "a, b", "completion": 'say "c"\nand d'}, {"prompt": "é\u2028", "completion": "x"}]
CSV = 'prompt,completion\n"a, b","say ""c""\nand d"\né\u2028,x\n'
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
LIST = json.dumps(ROWS)
PRETTY = json.dumps(ROWS, indent=1)
NUMBERED = [", record 1", ", record 2"]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    written = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), written)
    return written.getvalue()


def arrow_of(rows: list[dict[str, Any]], *, stream: bool) -> bytes:
    written, table = io.BytesIO(), arrow.Table.from_pylist(rows)
    with (arrow.ipc.new_stream if stream else arrow.ipc.new_file)(written, table.schema) as writer:
        writer.write_table(table)
    return written.getvalue()


def error_of(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        list(file_records(path))
    return caught.value


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("d.json", PRETTY, NUMBERED),
        ("d.json", LIST, NUMBERED),
        ("d.jsonl", PRETTY, NUMBERED),
        ("d.jsonl", LIST, NUMBERED),
        ("d", LIST, NUMBERED),
        ("d.csv", PRETTY, NUMBERED),
        ("d.jsonl", LINES, [":1", ":2"]),
        ("d.json", LINES, [":1", ":2"]),
        ("d.ndjson", LINES, [":1", ":2"]),
        ("d.txt", LINES, [":1", ":2"]),
        ("d.csv", LINES, [":1", ":2"]),
        ("d", LINES, [":1", ":2"]),
        ("d.jsonl", LINES.replace("\n", "\r\n"), [":1", ":2"]),
        ("d.jsonl", "\ufeff\n" + LINES, [":2", ":3"]),
        ("d.jsonl", LINES.replace("}\n{", "}\n\ufeff{"), [":1", ":2"]),
        ("d.json", json.dumps({"version": "1", "data": ROWS}), NUMBERED),
        ("d.json", json.dumps({"version": "1", "data": ROWS}, indent=2), NUMBERED),
        ("d.json", json.dumps({"train": ROWS, "labels": ["a"]}, indent=2), NUMBERED),
        ("d.json", "\n".join(json.dumps(row, indent=2) for row in ROWS), NUMBERED),
        ("d.csv", CSV, [":2", ":4"]),
        ("D.CSV", CSV, [":2", ":4"]),
        ("d", CSV, [":2", ":4"]),
        ("d.json", CSV, [":2", ":4"]),
        ("d.csv", CSV.replace("prompt,completion", "prompt;completion").replace('b",', 'b";').replace("28,", "28;")
         .replace("\u2028,", "\u2028;"), [":2", ":4"]),
        ("d.tsv", CSV.replace("t,c", "t\tc").replace('b",', 'b"\t').replace("\u2028,", "\u2028\t"), [":2", ":4"]),
        ("d.jsonl", LINES.encode("utf-16"), [":1", ":2"]),
        ("d.json", PRETTY.encode("utf-32"), NUMBERED),
        ("d.csv", CSV.encode("utf-16"), [":2", ":4"]),
        ("d.parquet", parquet_of(ROWS), NUMBERED),
        ("d", parquet_of(ROWS), NUMBERED),
        ("d.json", arrow_of(ROWS, stream=False), NUMBERED),
        ("d.arrow", arrow_of(ROWS, stream=True), NUMBERED),
    ],
)  # fmt: skip
def test_every_way_of_keeping_records_gives_them_in_their_places(
    tmp_path: Path, name: str, content: str | bytes, places: list[str]
) -> None:
    path = write(tmp_path / name, content)
    check_file(path)
    assert list(file_records(path)) == [(f"{path}{place}", row) for place, row in zip(places, ROWS, strict=True)]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Say hi", "input": "", "output": "hi"},
        {"prompt": "q"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"instruction": "q", "instances": [{"input": "", "output": "a"}]},
    ],
)
def test_one_record_alone_is_a_record_and_not_a_list_of_its_turns(tmp_path: Path, record: dict[str, object]) -> None:
    one_line, pretty = (write(tmp_path / f"{i}.json", json.dumps(record, indent=i)) for i in (None, 2))
    assert list(file_records(one_line)) == [(f"{one_line}:1", record)]
    assert list(file_records(pretty)) == [(f"{pretty}, record 1", record)]


@pytest.mark.parametrize(
    ("content", "bad"),
    [
        (LINES + '{"prompt" 2}\n', {":3": ":3:11: invalid JSON: Expecting ':' delimiter"}),
        ('{"prompt": "a"\n' + LINES, {":1": ":1:1: invalid JSON: Expecting ',' delimiter"}),
        ('{"prompt" "a"}\n' + LINES, {":1": ":1:11: invalid JSON: Expecting ':' delimiter"}),
        ("5\n" + LINES + "[]\n", {":1": ":1: a record must be a JSON object, not a number",
                                  ":4": ":4: a record must be a JSON object, not a list"}),
        (LINES + "{},\n", {":3": ":3:3: invalid JSON: a comma after the object"}),
        (LINES + "\0\0\0\n", {":3": ":3:1: invalid JSON: a NUL byte"}),
        (LINES + '{"a": ' + "[" * 99999 + "\n", {":3": ":3: JSON nested too deeply"}),
        (LINES + '{"a": ' + "9" * 5000 + "}\n", {":3": ":3: a number of more than 4,300 digits"}),
        (LINES + '{"a": "\\ud800"}\n', {":3": ":3: half of a surrogate pair, which is not a character"}),
        (f"[5, {LIST[1:-1]}]", {", record 1": ", record 1: a record must be a JSON object, not a number"}),
        ('[{"a": ["\\ud800"]}, ' + LIST[1:],
         {", record 1": ", record 1: half of a surrogate pair, which is not a character"}),
    ],
)  # fmt: skip
def test_a_bad_record_is_told_in_its_place_and_the_next_follows(
    tmp_path: Path, content: str, bad: dict[str, str]
) -> None:
    path = write(tmp_path / "d.jsonl", content)
    found = list(file_records(path))
    told = {where: record.message for where, record in found if isinstance(record, DataError)}
    assert told == {f"{path}{place}": f"{path}{message}" for place, message in bad.items()}
    assert [record for _, record in found if not isinstance(record, DataError)] == ROWS


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a,b,c\n", ":2: 3 fields, but the header names 2"),
        ("a\n", ":2: 1 fields, but the header names 2"),
        ('"a"b,c\n', ":2: ',' expected after '\"'"),
        ("a,b\rc,d\n", ":2: a carriage return ends a line there"),
        ("a,\0\n", ":2: a NUL byte"),
    ],
)
def test_a_bad_row_is_told_in_its_place_and_the_next_follows(tmp_path: Path, content: str, told: str) -> None:
    path = write(tmp_path / "d.csv", f"prompt,completion\n{content}x,y\n")
    (where, error), (_, row) = file_records(path)
    assert where == f"{path}:2"
    assert isinstance(error, DataError)
    assert error.message == f"{path}{told}"
    assert row == {"prompt": "x", "completion": "y"}


def test_a_quote_that_is_never_closed_is_told_where_its_row_starts(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", 'prompt,completion\nx,y\n"a\nb\n')
    _, (where, error) = file_records(path)
    assert isinstance(error, DataError)
    assert error.message == f"{where}: unexpected end of data: a quote is not closed"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.json", '[\n {"a": 1},\n {"a": ]', "d.json:3:8: invalid JSON: Expecting value"),
        ("d.json", "[\n{}\n{}\n{}\n]", "d.json:3:1: invalid JSON: Expecting ',' delimiter"),
        ("d.json", "[{}] {}", "d.json:1:6: invalid JSON: another value follows the list"),
        ("d.json", '{"messages": [\n{"role": "a"},\n{"role": "b"}\n{"role": "c"}\n]}', "d.json:4:1: invalid JSON"),
        ("d.json", '{\n"a": 1\n}\n{\n"a":', "d.json:5:5: invalid JSON: Expecting value"),
        ("d.json", "[" * 99999, "d.json:1:2: JSON nested too deeply"),
        ("d.json", '[{"a": ' + "9" * 5000 + "}]", "d.json:1:2: a number of more than 4,300 digits"),
        ("d.jsonl", "5\n", "d.jsonl:1: a record must be a JSON object, not a number"),
        ("d.json", '"text"', "d.json:1: a record must be a JSON object, not text"),
        ("d.json", "null", "d.json:1: a record must be a JSON object, not null"),
        ("d.json", "[1, 2]", "d.json is no file of records: none of its first 2 can be read; the first: "),
        ("d.jsonl", "plain\ntext\n", "none of its first 2 can be read; the first: {}:1:1: invalid JSON"),
        ("d.jsonl", "plain\n" * 5000, "none of its first 1000 can be read"),
        ("d.json", '{"version": 1, "data": "x"}', "is one JSON object with keys version, data; a list of records is "),
        ("d.json", json.dumps(dict.fromkeys("abcdefghijk", 1)), "with keys a, b, c, d, e, f, g, h and 3 more; a list"),
        ("d.json", "{}", "is one JSON object with no keys; a list of records is wanted"),
        ("d.json", '{"data": []}', "is one JSON object with keys data; a list of records is wanted"),
        ("d.json", "", "d.json holds no record (0 bytes)"),
        ("d.json", "[]", "d.json holds no record (2 bytes)"),
        ("d.jsonl", "\n\n", "d.jsonl holds no record (2 bytes)"),
        ("d.csv", "\n \n", "d.csv holds no record (3 bytes)"),
        ("d.csv", "input,output\n", "d.csv holds no record (13 bytes)"),
        ("d.csv", "text,text\na,b\n", "d.csv: the header names text twice"),
        ("d.csv", "text,output\ra,b", "d.csv:1: a carriage return ends a line there"),
        ("d.parquet", "PAR", "d.parquet is not a readable Parquet file: it starts with 'PAR'"),
        ("d.parquet", parquet_of(ROWS)[:-1], "d.parquet is not a readable Parquet file: its end is missing"),
        ("d.parquet", b"PAR1" + b"x" * 40 + b"PAR1", "d.parquet is not a readable Parquet file: "),
        ("d.arrow", arrow_of(ROWS, stream=False)[:99], "d.arrow is not a readable Arrow file: its end is missing"),
        ("d.arrow", arrow_of(ROWS, stream=True)[:99], "d.arrow is not a readable Arrow file: "),
        ("d.arrow", b"\xff\xff\xff\xff", "d.arrow is not a readable Arrow file: "),
        ("d.text", "What is this?", "d.text is text that starts with 'What is this?', not JSON"),
        ("d", "[INST] hi", "d is text that starts with '[INST] hi', not JSON"),
        ("d.jsonl", LINES.encode("utf-16-le"), "d.jsonl is UTF-16LE without a byte order mark"),
        ("d.jsonl", b"\0" * 999, "d.jsonl is binary"),
        ("d", b"version https://git-lfs.github.com/spec/v1\noid x\n", "is a pointer of Git LFS"),
        ("d.json", "<!DOCTYPE html>\n<html>", "is a web page, not the data"),
        ("d.csv", b"SQLite format 3\0", "is an SQLite database"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_what_it_is(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    path = write(tmp_path / name, content)
    assert said.format(path) in error_of(path).message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"text\na\n\xe9,b\n", "byte 0xe9 at position 7, in line 3, perhaps WINDOWS-1252"),
        (b"text\na\n\xe9\x81,b\n", "byte 0xe9 at position 7, in line 3, perhaps ISO-8859-1"),
        ("text\né\n".encode() + b"\xff", "byte 0xff at position 8, in line 3, though the text before it is"),
    ],
)
def test_the_first_byte_that_is_not_utf8_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = write(tmp_path / "d.csv", content)
    assert error_of(path).message.startswith(f"{path} is not UTF-8: {said}")


def zipped(content: str) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        # Without a time: these bytes name a test, and two processes must find the same names.
        archive.writestr(zipfile.ZipInfo("inside.jsonl"), content)
    return written.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said", "made"),
    [
        ("d.parquet.gz", gzip.compress(parquet_of(ROWS), mtime=0), "is Parquet compressed with gzip", "d.parquet"),
        ("d.zip", zipped(LINES), "is a zip archive", "inside.jsonl"),
        ("d é.csv", CSV.replace("\u2028", "").encode("cp1252"), "perhaps WINDOWS-1252", "d é.utf8.csv"),
        ("d.jsonl", LINES.encode("utf-16-be"), "is UTF-16BE without", "d.utf8.jsonl"),
        ("d.csv", b"prompt,completion\ra,b\r", "a carriage return", "d.newlines.csv"),
        ("it's.json", json.dumps({"train": ROWS, "test": ROWS}), "with keys train, test", "it's.records.json"),
        ("d.json", json.dumps({"prompt": {"0": "a"}, "completion": {"0": "b"}}), "keys prompt", "d.records.json"),
        ("d.json", json.dumps({"prompt": ["a"], "completion": ["b"]}), "keys prompt", "d.records.json"),
        ("d.json", json.dumps({"0": {"prompt": "a"}, "x": {"prompt": "b"}}), "keys 0, x", "d.records.json"),
        ("d.json", json.dumps({"columns": ["prompt"], "data": [["a"]]}), "keys columns, data", "d.records.json"),
    ],
)  # fmt: skip
def test_the_command_that_is_named_makes_a_file_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, said: str, made: str
) -> None:
    monkeypatch.chdir(tmp_path)
    error = error_of(write(Path(name), content))
    assert said in error.message
    if shutil.which(error.try_.split()[0]) is None:
        pytest.skip(f"needs {error.try_.split()[0]}")
    subprocess.run(["bash", "-c", error.try_], check=True, timeout=60, capture_output=True)
    assert all(isinstance(record, dict) and "prompt" in record for _, record in file_records(Path(made)))


@pytest.mark.parametrize(
    ("name", "content", "said", "command"),
    [
        ("d.zst", b"\x28\xb5\x2f\xfd", "is compressed with zstd", "unzstd -k d.zst"),
        ("d.tar.gz", gzip.compress(b"x", mtime=0), "is compressed with gzip", "tar -xf d.tar.gz"),
        ("d.xlsx", zipped(""), "is a spreadsheet", "save it as CSV in UTF-8"),
        ("d.pkl", pickle.dumps(ROWS), "is a Python pickle, which may run code", "python3 -c 'import pandas; "),
    ],
)
def test_what_is_packed_is_named_with_what_unpacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, said: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    error = error_of(write(Path(name), content))
    assert said in error.message
    assert error.try_.startswith(command)


@pytest.mark.parametrize("content", [PRETTY, LIST, '{"v": 1,\n"data": ' + LIST + "}", PRETTY[1:-1].replace("},", "}")])
def test_json_over_many_chunks_is_read_as_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    path = write(tmp_path / "d.json", content)
    whole = list(file_records(path))
    for size in (1, 2, 7, 30):
        monkeypatch.setattr(json_records, "_CHUNK", size)
        assert list(file_records(path)) == whole
    broken = write(tmp_path / "b.json", content[:-4])
    monkeypatch.setattr(json_records, "_CHUNK", 1 << 20)
    told = error_of(broken).message
    monkeypatch.setattr(json_records, "_CHUNK", 7)
    assert error_of(broken).message == told


def test_a_list_on_one_long_line_is_told_without_a_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "d", json.dumps([{"prompt": "x" * 99}] * 999))
    assert sum(1 for _ in file_records(path)) == 999


def test_lines_and_lists_are_read_as_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "_CHUNK", 64)
    for start in (LINES, LIST[:-1] + ", "):
        late = b'{"text": "' + b"x" * 99_999 + b'\xe9"}]\n'
        records = file_records(write(tmp_path / "d", start.encode() + late))
        assert next(records)[1] == ROWS[0]
        with pytest.raises(DataError):
            list(records)


def test_a_long_field_of_a_table_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", f"text\n{'x' * 200_000}\n")
    assert [record for _, record in file_records(path)] == [{"text": "x" * 200_000}]


def test_a_column_without_a_name_is_told_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", ",prompt, completion\n0,a,b\n")
    assert [record for _, record in file_records(path)] == [{"column 1": "0", "prompt": "a", "completion": "b"}]


def test_the_digest_follows_contents_and_form_and_not_the_name(tmp_path: Path) -> None:
    names = ("a.jsonl", "b.txt", "c")
    assert len({file_digest(write(tmp_path / name, LINES)) for name in names}) == 1
    others = (("d.jsonl", LINES + " "), ("e.csv", "text\nx;y\n"), ("f.tsv", "text\nx;y\n"), ("g.json", ""))
    assert len({file_digest(write(tmp_path / name, content)) for name, content in others}) == 4


@pytest.mark.parametrize(
    ("name", "content", "records"),
    [
        ("p.txt", "What does a cat eat?\n", False),
        ("p.txt", "", False),
        ("p", "[INST] hi [/INST]", False),
        ("p.txt", '{"name": "Bob"} is what?\nplain\n', False),
        ("p.txt", "prompt, completion and text\n", False),
        ("p.txt", b"O\xf9 mange le chat ?\n", False),
        ("p.txt", '\ufeff\n{"prompt": "q"}\n', True),
        ("p.txt", PRETTY, True),
        ("p.jsonl", '{"prompt": "q"}', True),
        ("p.json", PRETTY, True),
        ("p.csv", "prompt\nq\n", True),
        ("p.tsv", "prompt\nq\n", True),
        ("p", parquet_of(ROWS), True),
        ("p", arrow_of(ROWS, stream=True), True),
    ],
)
def test_prompts_are_records_or_plain_lines(tmp_path: Path, name: str, content: str | bytes, records: bool) -> None:
    assert holds_records(write(tmp_path / name, content)) == records


def test_lines_of_text_end_at_newlines_only(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "\ufeffone\u2028still\r\n\ntwo")
    assert read_text_lines(path) == [(f"{path}:1", "one\u2028still"), (f"{path}:2", ""), (f"{path}:3", "two")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"O\xf9 mange le chat ?\n", "is not UTF-8: byte 0xf9 at position 1, in line 1"),
        (b"\x1f\x8b", "damaged: gzip cannot decompress it"),
        ("What?\n".encode("utf-16-le"), "UTF-16LE"),
    ],
)
def test_lines_of_no_text_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_text_lines(write(tmp_path / "p.txt", content))


CHATS = [
    {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": 'say "é"'}]} for n in "123"
]
SEEDS = {
    "a.json": json.dumps(CHATS, indent=1).encode(),
    "b.jsonl": "".join(json.dumps(chat) + "\n" for chat in CHATS).encode(),
    "c.json": json.dumps({"version": 1, "data": CHATS}, indent=1).encode(),
    "d.csv": CSV.encode(),
    "e": CSV.encode(),
    "f.parquet": parquet_of(CHATS),
    "g.arrow": arrow_of(CHATS, stream=False),
    "h.arrow": arrow_of(CHATS, stream=True),
}  # fmt: skip
PIECES = (b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b'"', b"[", b"]", b"{", b"}", b",", b"\n", b"\r", b"\\ud800", b"\xc3",
          b"9" * 5000, b"[" * 3000, b'{"a":' * 3000)  # fmt: skip


def mutated(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(changed) + 1)
        match chance.choice(("truncate", "flip", "insert", "cut out")):
            case "truncate":
                del changed[place:]
            case "flip" if place < len(changed):
                changed[place] ^= 1 << chance.randrange(8)
            case "insert":
                changed[place:place] = chance.choice(PIECES)
            case "cut out":
                del changed[place : place + chance.randint(1, 20)]
    return bytes(changed)


def test_whatever_is_in_a_file_ends_in_records_or_sentences(tmp_path: Path) -> None:
    chance = random.Random(14)
    outcomes = []
    for number in range(300):
        name = chance.choice(sorted(SEEDS))
        path = write(tmp_path / name, mutated(SEEDS[name], chance))
        for ask in (check_file, form_of, file_digest, holds_records, read_text_lines):
            outcome(ask, path)
        outcomes.append(outcome(lambda path: list(file_records(path)), path))
        assert all(isinstance(record, dict | DataError) for _, record in outcomes[-1] or ()), number
    assert {bool(found) for found in outcomes} == {True, False}


def outcome(ask: Any, path: Path) -> Any:
    """What was asked, or None where that ended in a sentence."""
    try:
        return ask(path)
    except DataError:
        return None
