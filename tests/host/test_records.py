"""Every way of keeping records on a disk gives the same records, with their places."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdist.core.errors import DataError
from qdist.host.records import read_records, source_digest

ROWS = [{"input": "a, b", "output": 'say "c"\nand d'}, {"input": "é\u2028", "output": "x"}]
CSV = 'input,output\n"a, b","say ""c""\nand d"\né\u2028,x\n'


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def json_lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("d.json", json.dumps(ROWS, indent=1), [", record 1", ", record 2"]),
        ("d.jsonl", json_lines(ROWS), [":1", ":2"]),
        ("d.jsonl", json_lines(ROWS).replace("\n", "\r\n"), [":1", ":2"]),
        ("d.jsonl", "\ufeff\n" + json_lines(ROWS), [":2", ":3"]),
        ("d.json", json_lines(ROWS), [":1", ":2"]),
        ("d.csv", CSV, [":2", ":4"]),
        ("D.CSV", CSV, [":2", ":4"]),
        ("d.tsv", CSV.replace("input,output", "input\toutput").replace("d\"\né\u2028,", "d\"\né\u2028\t")
         .replace('"a, b",', '"a, b"\t'), [":2", ":4"]),
    ],
)  # fmt: skip
def test_each_text_format_gives_the_records_and_their_places(
    tmp_path: Path, name: str, content: str, places: list[str]
) -> None:
    path = write(tmp_path / name, content)
    assert list(read_records(str(path))) == [(f"{path}{place}", row) for place, row in zip(places, ROWS, strict=True)]


def test_parquet_gives_the_records_and_their_places(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "d.parquet"
    parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    assert list(read_records(str(path))) == [(f"{path}, record 1", ROWS[0]), (f"{path}, record 2", ROWS[1])]


def test_a_folder_gives_the_records_of_its_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", json_lines(ROWS[1:]))
    write(tmp_path / "a.json", json.dumps(ROWS[:1]))
    write(tmp_path / "README.md", "about the data")
    assert [row for _, row in read_records(str(tmp_path))] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.json", '[\n {"a": 1},\n {"a": ]', "d.json:3:8: invalid JSON: Expecting value"),
        ("d.jsonl", '{"a": 1}\n{"a" 2}\n', "d.jsonl:2:6: invalid JSON: Expecting ':' delimiter"),
        ("d.jsonl", "5\n", "d.jsonl:1: a record must be a JSON object, not int"),
        ("d.json", "[{}, 5]", "d.json, record 2: a record must be a JSON object, not int"),
        ("d.json", "", "d.json holds no record (0 bytes)"),
        ("d.json", "[]", "d.json holds no record (2 bytes)"),
        ("d.jsonl", "\n\n", "d.jsonl holds no record (2 bytes)"),
        ("d.csv", "input,output\n", "d.csv holds no record (13 bytes)"),
        ("d.csv", "input,output\na\n", "d.csv:2: 1 fields, but the header names 2"),
        ("d.csv", 'input,output\n"a', "d.csv:2: unexpected end of data"),
        ("d.parquet", "PAR", "d.parquet is not a readable Parquet file"),
        ("d.txt", "a", "d.txt ends in .txt, so its format is unknown"),
        ("d", "a", "d has no suffix, so its format is unknown"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        list(read_records(str(path)))
    assert said in caught.value.message


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes("input,output\né,b\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        list(read_records(str(tmp_path / "d.csv")))


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_records(str(write(tmp_path / "d.xlsx", "")))
    assert caught.value.try_ == "one of .json, .jsonl, .csv, .tsv, .parquet"


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError) as caught:
        read_records(str(tmp_path / "trian.jsonl"))
    assert caught.value.message == f"{tmp_path / 'trian.jsonl'} does not exist"
    assert caught.value.try_ == str(tmp_path / "train.jsonl")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere/at/all.jsonl", "nor does its folder nowhere/at"),
        ("absent-data.txt", "absent-data.txt does not exist"),
        ("absent-data.jsonl", "absent-data.jsonl does not exist"),
        ("./absent", "absent does not exist"),
    ],
)
def test_a_name_that_means_a_file_is_never_asked_of_the_hub(source: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_records(source)
    assert said in caught.value.message


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data file"):
        read_records(str(tmp_path))


class FakeHub(types.ModuleType):
    """The two functions of the package datasets that are used, over one data set."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.revision = "c0ffee"
        self.exceptions = types.SimpleNamespace(DatasetsError=RuntimeError)

    def load_dataset(self, name: str, *, split: str) -> Iterator[dict[str, str]]:
        if name == "owner/other":
            raise ConnectionError(f"Couldn't reach {name}\nmore")
        return iter([{"text": split}])

    def load_dataset_builder(self, name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(hash=f"{name}@{self.revision}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


@pytest.mark.parametrize(
    ("source", "split"), [("owner/data-2.5", "train"), ("owner/data-2.5:test", "test"), ("owner/data.v2", "train")]
)
def test_another_name_is_asked_of_the_hub(hub: FakeHub, source: str, split: str) -> None:
    assert list(read_records(source)) == [(f"{source}, record 1", {"text": split})]


def test_what_the_hub_does_not_have_is_refused_with_its_reason(hub: FakeHub) -> None:
    with pytest.raises(DataError) as caught:
        list(read_records("owner/other"))
    assert caught.value.message.endswith("the hub did not give it: Couldn't reach owner/other")


def test_the_digest_follows_the_contents_and_not_the_name(tmp_path: Path) -> None:
    one, same = write(tmp_path / "a.jsonl", "{}"), write(tmp_path / "b.jsonl", "{}")
    other, table = write(tmp_path / "c.jsonl", "{} "), write(tmp_path / "d.csv", "{}")
    assert source_digest(str(one)) == source_digest(str(same))
    assert len({source_digest(str(path)) for path in (one, other, table, tmp_path)}) == 4


def test_the_digest_of_a_hub_data_set_follows_its_revision(hub: FakeHub) -> None:
    before = source_digest("owner/data-2.5")
    assert source_digest("owner/data-2.5:train") == before != source_digest("owner/data-2.5:test")
    hub.revision = "decaf"
    assert source_digest("owner/data-2.5") != before
