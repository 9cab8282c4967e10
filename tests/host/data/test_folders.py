"""Of a folder what is meant for training is read, and what is left out is named."""

import gzip
import json
from pathlib import Path

import pytest

from qdist.core.errors import DataError
from qdist.host.data.records import check_source, read_records, source_notes

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def fill(folder: Path, *names: str) -> None:
    """Files with one record each, which holds the name of its file."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"text": name}
        if path.suffix == ".parquet":
            parquet.write_table(arrow.Table.from_pylist([record]), path)
        elif path.suffix == ".arrow":
            table = arrow.Table.from_pylist([record])
            with arrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
        elif path.suffix == ".csv":
            path.write_text(f"text\n{name}\n")
        else:
            path.write_text(json.dumps(record) + "\n")


def save_to_disk(folder: Path, *names: str) -> None:
    fill(folder, *names)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text('{"features": {}}')


def read(folder: Path) -> list[object]:
    check_source(str(folder))
    return [record["text"] for _, record in read_records(f"{folder}/") if not isinstance(record, DataError)]


def refusal(folder: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        check_source(str(folder))
    return caught.value


@pytest.mark.parametrize(
    ("names", "used", "note"),
    [
        (["d.jsonl"], ["d.jsonl"], ""),
        (["b.jsonl", "a.json", "c"], ["a.json", "b.jsonl", "c"], "read 3 files: a.json, b.jsonl, c"),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], "read train.jsonl; left out: test.jsonl (not trained on)"),
        (["my_train.csv", "my-VAL.csv", "my.eval2.csv"], ["my_train.csv"],
         "read my_train.csv; left out: my-VAL.csv, my.eval2.csv (not trained on)"),
        (["train/a.jsonl", "train/b.jsonl", "validation/a.jsonl"], ["train/a.jsonl", "train/b.jsonl"],
         "read 2 files: train/a.jsonl, train/b.jsonl; left out: validation/ (not trained on)"),
        (["train.jsonl", "train_small.jsonl", "more.jsonl"], ["train.jsonl"],
         "read train.jsonl; left out: more.jsonl, train_small.jsonl (not trained on)"),
        (["train_en.jsonl", "train_fr.jsonl"], ["train_en.jsonl", "train_fr.jsonl"],
         "read 2 files: train_en.jsonl, train_fr.jsonl"),
        (["d.jsonl", "dev.jsonl"], ["d.jsonl"], "read d.jsonl; left out: dev.jsonl (not trained on)"),
        (["latest.jsonl", "device.jsonl", "contest.jsonl"], ["contest.jsonl", "device.jsonl", "latest.jsonl"],
         "read 3 files: contest.jsonl, device.jsonl, latest.jsonl"),
        (["train-test.jsonl", "b.jsonl"], ["b.jsonl", "train-test.jsonl"], "read 2 files: b.jsonl, train-test.jsonl"),
        (["test-0.jsonl", "test-1.jsonl"], ["test-0.jsonl", "test-1.jsonl"],
         "read 2 files: test-0.jsonl, test-1.jsonl"),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
         ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
         "read 2 files: data/train-00000-of-00002.parquet, data/train-00001-of-00002.parquet; "
         "left out: data/test-00000-of-00001.parquet (not trained on)"),
        (["data/train.parquet", "extra/x.jsonl"], ["data/train.parquet"],
         "read data/train.parquet; left out: extra/ (not trained on)"),
        (["en/train-0.parquet"], ["en/train-0.parquet"], ""),
        (["a.jsonl", "deep/er/b.jsonl"], ["a.jsonl"], "read a.jsonl; left out: deep/ (not trained on)"),
        ([f"{n}.jsonl" for n in range(7)], [f"{n}.jsonl" for n in range(7)],
         "read 7 files: 0.jsonl, 1.jsonl, 2.jsonl, 3.jsonl and 3 more"),
    ],
)  # fmt: skip
def test_the_training_files_are_read_and_the_others_named(
    tmp_path: Path, names: list[str], used: list[str], note: str
) -> None:
    fill(tmp_path, *names)
    assert read(tmp_path) == used
    assert source_notes(str(tmp_path)) == ((note,) if note else ())


def test_what_describes_the_data_is_no_data(tmp_path: Path) -> None:
    fill(tmp_path, "mine.json", ".hidden.jsonl", ".cache/x.jsonl")
    for name in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"):
        (tmp_path / name).write_text('{"mine": {"file_name": "mine.json"}}')
    for name in ("README.md", "README", "LICENSE", ".gitattributes", "load.py", "cover.png"):
        (tmp_path / name).write_text("about the data")
    assert read(tmp_path) == ["mine.json"]
    assert source_notes(str(tmp_path)) == ()


def test_text_beside_the_data_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "mine.json")
    (tmp_path / "notes.txt").write_text("about the data")
    assert source_notes(str(tmp_path)) == ("read mine.json; left out: notes.txt (not trained on)",)


def test_a_saved_data_set_is_read_in_the_order_of_its_state(tmp_path: Path) -> None:
    save_to_disk(tmp_path, "data-1.arrow", "data-0.arrow")
    fill(tmp_path, "cache-9.arrow")
    assert read(tmp_path) == ["data-1.arrow", "data-0.arrow"]


def test_of_saved_splits_train_is_read(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "train", "data-0.arrow")
    save_to_disk(tmp_path / "test", "data-1.arrow")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(tmp_path) == ["data-0.arrow"]
    assert source_notes(str(tmp_path)) == ("read train/data-0.arrow; left out: test/ (not trained on)",)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("{", "is not JSON: line 1"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "names data files that are missing: gone.arrow"),
        ('{"_data_files": []}', "names no data files"),
        ('{"_data_files": [5]}', "names no data files"),
        ('{"_data_files": [], "_indices_data_files": ["x"]}', "picks rows by their numbers, which is not read"),
    ],
)
def test_a_saved_data_set_that_is_not_whole_is_refused(tmp_path: Path, state: str, said: str) -> None:
    (tmp_path / "state.json").write_text(state)
    assert said in refusal(tmp_path).message


@pytest.mark.parametrize(
    ("names", "said", "tried"),
    [
        ([], "holds no data file", "a folder with JSON, JSON lines, CSV, TSV, Parquet or Arrow"),
        (["en/train.parquet", "fr/train.parquet"], "holds 2 data sets: en, fr", "{}/en"),
        (
            ["test.jsonl", "valid.jsonl"],
            "holds no training data by its names: test.jsonl, valid.jsonl",
            "{}/test.jsonl",
        ),
    ],
)
def test_a_folder_without_a_clear_choice_is_refused(tmp_path: Path, names: list[str], said: str, tried: str) -> None:
    fill(tmp_path, *names)
    error = refusal(tmp_path)
    assert said in error.message
    assert error.try_ == tried.format(tmp_path)


def test_the_test_file_is_not_taken_for_packed_training_data(tmp_path: Path) -> None:
    fill(tmp_path, "test.jsonl")
    (tmp_path / "train.jsonl.gz").write_bytes(b"\x1f\x8b and so on")
    assert refusal(tmp_path).message.startswith(f"{tmp_path}/train.jsonl.gz is damaged: gzip cannot decompress it")


def test_compressed_files_of_a_folder_are_read_as_they_are(tmp_path: Path) -> None:
    fill(tmp_path, "test.jsonl")
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}'))
    assert read(tmp_path) == ["packed"]


def test_a_folder_of_compressed_files_within_another_is_read(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/records.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n'))
    assert read(tmp_path) == ["one"]


def test_plain_text_alone_in_a_folder_is_its_data(tmp_path: Path) -> None:
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text(f"the text of {name}\n")
    assert read(tmp_path) == ["the text of train.txt\n"]


def test_a_broken_link_or_an_empty_file_in_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("gone.jsonl")
    assert "a.jsonl is a link to gone.jsonl, which does not exist" in refusal(tmp_path).message
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl").touch()
    assert "a.jsonl holds no record (0 bytes)" in refusal(tmp_path).message
