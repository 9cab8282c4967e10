"""Where records come from: files, the hub, and what a mistyped name means."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qdist.core.errors import DataError
from qdist.host.data.records import check_source, read_records, source_digest, source_notes


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def refusal(source: str) -> DataError:
    """What every question about a source ends with."""
    told = []
    for ask in (read_records, check_source, source_digest, source_notes):
        with pytest.raises(DataError) as caught:
            ask(source)
        told.append(caught.value)
    assert len({str(error) for error in told}) == 1
    return told[0]


def test_a_bad_record_is_handed_on_in_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "a"}\n5\n{"text": "b"}\n')
    check_source(str(path))
    (_, first), (where, bad), (_, last) = read_records(str(path))
    assert (first, where, last) == ({"text": "a"}, f"{path}:2", {"text": "b"})
    assert isinstance(bad, DataError)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no record (0 bytes)"),
        ("plain text\n", "is text that starts with"),
        ("5\n", "is text that starts with '5'"),
        ('{"version": 1}', "is one JSON object with keys version"),
        ("[1]", "is text that starts with '[1]'"),
    ],
)
def test_what_a_look_at_the_beginning_shows_is_refused_before_anything_starts(
    tmp_path: Path, content: str, said: str
) -> None:
    path = str(write(tmp_path / "d", content))
    with pytest.raises(DataError) as caught:
        check_source(path)
    assert said in caught.value.message
    source_digest(path)  # leaves the telling to what reads


def test_a_damaged_parquet_file_is_refused_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="is not a readable Parquet file: its end is missing"):
        check_source(str(write(tmp_path / "d.parquet", "PAR1 and no more")))


@pytest.mark.parametrize(
    ("source", "said", "tried"),
    [
        ("data/my-fiel.jsonl", "data/my-fiel.jsonl does not exist", "data/my-file.jsonl"),
        ("data/my-fiel", "data/my-fiel does not exist", "data/my-file.jsonl"),
        ("dta/my-file.jsonl", "dta/my-file.jsonl does not exist, nor does its folder dta", "data/my-file.jsonl"),
        ("data/zzz", "data/zzz does not exist", "ls data"),
        ("data/my-file.jsonl:train", "data/my-file.jsonl:train does not exist", "data/my-file.jsonl"),
        ("data/my-file.jsonl/x", "data/my-file.jsonl is a file, not a folder", "data/my-file.jsonl"),
        ("trian.jsonl", "trian.jsonl does not exist", "train.jsonl"),
        ("train", "train does not exist", "train.jsonl"),
        ("trainn", "trainn does not exist", "train.jsonl"),
        ("dat", "dat does not exist", "data"),
        ("x.jsonl", "x.jsonl does not exist", "ls ."),
        ("absent.txt", "absent.txt does not exist", "ls ."),
        ("./absent", "absent does not exist", "ls ."),
        ("nowhere/at/all.jsonl", "nowhere/at/all.jsonl does not exist, nor does its folder nowhere/at", "ls ."),
        ("~nobody-at-all/x.jsonl", "nor does its folder ~nobody-at-all", "ls ."),
        ("", "no data was named", "--data FILE"),
        (" ", "no data was named", "--data FILE"),
        ("two words", "two words does not exist", "ls ."),
        ("x" * 999, "cannot be read: File name too long", f"ls -ld {'x' * 999}"),
        ("https://huggingface.co/datasets/owner/name/viewer", "is an address", "--data owner/name"),
        ("hf://datasets/owner/name", "is an address", "--data owner/name"),
        ("https://a.b/c d.jsonl", "does not exist", "ls ."),
        ("https://a.b/c.jsonl?x&y", "is an address", "curl -LO 'https://a.b/c.jsonl?x&y'"),
    ],
)
def test_a_name_that_means_a_file_is_never_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str, tried: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    write(Path("data/my-file.jsonl"), "{}")
    write(Path("train.jsonl"), "{}")
    error = refusal(source)
    assert said in error.message
    assert error.try_ == tried


def test_a_broken_link_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name, said in (("link", "is a link to gone.jsonl, which does not exist"), ("loop", "symbolic links")):
        with pytest.raises(DataError, match=said):
            check_source(str(tmp_path / f"{name}.jsonl"))


def test_what_the_system_keeps_from_reading_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "d.jsonl", "{}")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        check_source(str(path))
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        check_source(str(tmp_path))


def test_a_device_is_refused_and_not_waited_for() -> None:
    assert "is not a regular file" in refusal("/dev/null").message


class FakeHub(types.ModuleType):
    """The functions of the package datasets that are used, over one data set with a subset `code`."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
        self.revision = "c0ffee"
        self.exceptions = types.SimpleNamespace(DatasetsError=RuntimeError)

    def load_dataset(self, path: str, *, split: str, **options: Any) -> Iterator[dict[str, str]]:
        if path == "owner/other":
            raise ConnectionError(f"Couldn't reach {path}\nmore")
        return iter([] if split == "empty" else [{"text": " ".join([split, *map(str, options.values())])}])

    def load_dataset_builder(self, path: str, **options: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(hash=f"{path} {options}@{self.revision}")

    def get_dataset_config_names(self, path: str) -> list[str]:
        return ["code"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr("qdist.host.data.hub.is_out_of_reach", lambda address: False)
    return fake


@pytest.mark.parametrize(
    ("source", "split"),
    [
        ("owner/data-2.5", "train"),
        ("owner/data-2.5:test", "test"),
        ("owner/data.v2", "train"),
        ("owner/name:code", "train code"),
        ("owner/name:code@test", "test code"),
        ("owner/name:test@code", "code test"),
        ("owner/name@train[:1%]", "train[:1%]"),
        ("owner/name:train[:1%]", "train[:1%]"),
        ("alpaca", "train"),
        ("alpaca@train[10:20]", "train[10:20]"),
        ("self-instruct", "train self_instruct"),
        ("chip2", "train ['unified_chip2.jsonl']"),
    ],
)
def test_another_name_is_asked_of_the_hub(hub: FakeHub, source: str, split: str) -> None:
    assert list(read_records(source)) == [(f"{source}, record 1", {"text": split})]


def test_what_the_hub_does_not_have_is_refused_with_its_reason(hub: FakeHub) -> None:
    with pytest.raises(DataError) as caught:
        list(read_records("owner/other"))
    assert caught.value.message.endswith("the hub cannot be reached: Couldn't reach owner/other")


def test_a_hub_data_set_without_rows_is_refused(hub: FakeHub) -> None:
    with pytest.raises(DataError, match="owner/name:empty holds no record"):
        list(read_records("owner/name:empty"))


def test_nothing_is_noted_of_one_file_or_a_hub_data_set(tmp_path: Path, hub: FakeHub) -> None:
    assert source_notes(str(write(tmp_path / "d.jsonl", "{}"))) == source_notes("owner/name") == ()


def test_what_a_known_name_stands_for_is_noted() -> None:
    assert source_notes("alpaca") == ("alpaca is tatsu-lab/alpaca on the hub",)
    (place, remark) = source_notes("vicuna")
    assert place == "vicuna is anon8231489123/ShareGPT_Vicuna_unfiltered on the hub"
    assert "never released" in remark


def test_a_file_goes_before_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("alpaca"), '{"text": "mine"}')
    assert [record for _, record in read_records("alpaca")] == [{"text": "mine"}]


def test_the_digest_follows_the_contents_and_not_the_name(tmp_path: Path) -> None:
    one, same = write(tmp_path / "a.jsonl", "{}"), write(tmp_path / "b.txt", "{}")
    other, table = write(tmp_path / "c.jsonl", "{} "), write(tmp_path / "d.csv", "text\n{}")
    assert source_digest(str(one)) == source_digest(str(same))
    assert len({source_digest(str(path)) for path in (one, other, table, tmp_path)}) == 4


def test_the_digest_of_a_folder_follows_the_files_that_are_read(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", json.dumps({"text": "a"}))
    alone = source_digest(str(tmp_path))
    write(tmp_path / "test.jsonl", json.dumps({"text": "b"}))
    assert source_digest(str(tmp_path)) == alone
    write(tmp_path / "train2.jsonl", json.dumps({"text": "c"}))
    assert source_digest(str(tmp_path)) != alone


def test_the_digest_of_a_hub_data_set_follows_its_revision(hub: FakeHub) -> None:
    before = source_digest("owner/data-2.5")
    assert source_digest("owner/data-2.5:train") == before != source_digest("owner/data-2.5:test")
    assert before != source_digest("owner/data-2.5:code") == source_digest("owner/data-2.5:code@train")
    hub.revision = "decaf"
    assert source_digest("owner/data-2.5") != before
