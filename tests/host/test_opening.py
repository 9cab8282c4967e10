"""What strangers wrote is read, or refused in a sentence with the file and of the kind that was asked for."""

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from qdist.core.errors import DataError, ModelError, RunError, SpecError
from qdist.host.opening import read_object, read_text, read_toml, read_typed, reason_of, require_files, told


class Shape(msgspec.Struct):
    rows: int


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("\u00fc\n".encode(), "\u00fc\n"),
        ("\ufeff\u00fc".encode(), "\u00fc"),
        ("\u00fc".encode("utf-16"), "\u00fc"),
        ("\u00fc".encode("utf-32"), "\u00fc"),
        (b"", ""),
    ],
)
def test_text_is_read_in_the_encoding_that_it_says(content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(content)
    assert read_text(tmp_path / "text", DataError) == text


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is not JSON: line 1, column 1: Expecting value"),
        (b'{"a": 1,}', "is not JSON: line 1, column 9: "),
        (b"[1]", "is not a JSON object: it holds a list"),
        (b"\xff", "is not text: byte 0xff at position 0 is not UTF-8"),
        (b"[" * 100_000, "is not JSON: nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: a number of more than 4,300 digits"),
        (b'{"a": "\\ud800"}', "holds half of a surrogate pair"),
    ],
)
def test_what_is_no_object_is_told_with_its_place(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_object(path, ModelError, try_="download it again")
    assert caught.value.message.startswith(f"{path} {why}")
    assert caught.value.try_ == "download it again"


def test_a_file_of_another_shape_is_told(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text('{"rows": "many"}')
    with pytest.raises(RunError, match=r"kept.json: Expected `int`, got `str` - at `\$.rows`"):
        read_typed(path, Shape, RunError)
    path.write_text('{"rows": 3, "more": 1}')
    assert read_typed(path, Shape, RunError) == Shape(3)


@pytest.mark.parametrize("content", [b"a = ", b"a = " + b"[" * 100_000, b"\xff", b"a = 1\na = 2"])
def test_what_is_no_toml_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(SpecError, match=r"recipe.toml is n"):
        read_toml(tmp_path / "recipe.toml", SpecError)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (os.mkfifo, "is a pipe, not a file"),
        (os.mkdir, "is a folder, not a file"),
        (lambda path: path.symlink_to("gone"), "is a link to gone, which does not exist"),
        (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
        (lambda path: None, "does not exist"),
    ],
)
def test_what_is_no_file_is_told_and_never_waited_for(make: Callable[[Path], None], why: str, tmp_path: Path) -> None:
    make(tmp_path / "file")
    with pytest.raises(RunError, match=f"file {why}"):
        read_text(tmp_path / "file", RunError)


def test_a_pipe_in_a_folder_is_told_before_a_library_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "config.json").touch()
    require_files(tmp_path, ModelError)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.safetensors is a pipe, not a file"):
        require_files(tmp_path, ModelError)


class PanicException(BaseException):
    """As Rust's in Python."""


@pytest.mark.parametrize("error", [Exception("bare"), SystemError("odd"), PanicException("index out of bounds")])
def test_whatever_a_library_raises_is_told(error: BaseException) -> None:
    with pytest.raises(ModelError, match=f"x.json: {error}") as caught, told("x.json", ModelError, try_="y"):
        raise error
    assert caught.value.__cause__ is error


def test_a_library_that_is_not_installed_is_the_thing_to_try() -> None:
    with pytest.raises(ModelError) as caught, told("x.json", ModelError, try_="y"):
        raise ImportError("TimmWrapperModel requires the timm library")
    assert caught.value.try_ == "pip install what is named there"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), DataError("ours")])
def test_what_ends_the_process_and_errors_of_ours_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, told("x.json", ModelError):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("rows"), "no 'rows'"),
        (KeyError("'x' is not a known task"), "'x' is not a known task"),
        (ValueError(""), "ValueError"),
        (ValueError("first\nsecond"), "first"),
        (ValueError("Unrecognized:\n  the model"), "Unrecognized: the model"),
        (MemoryError(), "it asks for more memory than there is"),
        (ValueError("x" * 1000), "x" * 300 + "..."),
    ],
)
def test_a_reason_is_a_phrase(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
