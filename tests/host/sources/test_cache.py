"""What the cache makes of a file is found by all of what the file holds, which is read once."""

import os
from functools import partial
from pathlib import Path

import pytest

from qdist.host.sources import cache as cached
from qdist.host.sources.cache import converted_folder, known_converted_folder, remembered_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def gguf_file(folder: Path, last: bytes) -> Path:
    """A sparse one: 20 MiB of zeros, then a byte."""
    folder.mkdir()
    file = folder / "tuned.gguf"
    with open(file, "wb") as handle:
        handle.write(b"GGUF")
        handle.seek(20 << 20)
        handle.write(last)
    os.utime(file, (1, 1))
    return file


def test_files_equal_in_name_size_time_and_first_16_mib_are_two_models(tmp_path: Path) -> None:
    one, other, copy = (gguf_file(tmp_path / name, last) for name, last in (("a", b"1"), ("b", b"2"), ("c", b"1")))
    assert one.read_bytes()[: 16 << 20] == other.read_bytes()[: 16 << 20]
    assert converted_folder(one) != converted_folder(other)
    assert converted_folder(one) == converted_folder(copy)


def test_a_file_is_read_once_until_it_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = gguf_file(tmp_path / "a", b"1")
    assert known_converted_folder(file) is None
    folder = converted_folder(file)
    with monkeypatch.context() as patch:
        patch.setattr(cached, "_file_digest", None)
        assert converted_folder(file) == known_converted_folder(file) == folder
    os.replace(gguf_file(tmp_path / "b", b"2"), file)  # of the same name, size and time
    assert known_converted_folder(file) is None
    assert converted_folder(file) != folder


def test_what_changes_while_it_is_read_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a")

    def changing() -> str:
        file.write_text("ab")
        return "of a"

    assert remembered_of("letters", [file], changing) == "of a"
    assert remembered_of("letters", [file], lambda: "of ab") == "of ab"
    assert remembered_of("letters", [file], lambda: "never asked") == "of ab"
    assert remembered_of("words", [file], lambda: "of another kind") == "of another kind"


def test_a_cache_that_cannot_be_written_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a")
    cache.write_text("no folder")
    assert [remembered_of("letters", [file], partial(str, n)) for n in ("first", "second")] == ["first", "second"]
