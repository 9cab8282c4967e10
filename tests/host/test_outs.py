"""Where may a command write: what is followed, what is written to, what is refused; nothing is replaced."""

import os
import stat
import threading
from pathlib import Path

import pytest

from qdist.core.errors import JobError, RunError
from qdist.host.files import file_to_write, folder_to_write, stream_to_write, write_out


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("kept")
    Path("empty").mkdir()
    Path("used").mkdir()
    Path("used/kept").touch()
    os.mkfifo("pipe")
    for name, target in {"to-file": "file", "to-empty": "empty", "to-nothing": "new", "to-itself": "to-itself"}.items():
        Path(name).symlink_to(target)
    return tmp_path


def device(minor: int) -> Path:
    """A node of our own for the null device (3) or the full one (7): the machine's must not be at stake."""
    try:
        os.mknod("device", stat.S_IFCHR | 0o666, os.makedev(1, minor))
        with open("device", "wb"):
            pass
    except PermissionError:
        pytest.skip("device nodes cannot be made or opened here")
    return Path("device")


@pytest.mark.parametrize(
    ("out", "place"),
    [("new", "new"), ("deep/er", "deep/er"), ("empty", "empty"), ("used/new", "used/new"), ("to-empty", "{}/empty"),
     ("to-nothing", "{}/new")],
)  # fmt: skip
def test_a_folder_has_a_place_of_its_own_behind_links(out: str, place: str, here: Path) -> None:
    assert folder_to_write(out) == place.format(here.resolve())


@pytest.mark.parametrize(
    ("out", "why"),
    [("file", "file exists"), ("used", "used exists"), ("to-file", "to-file exists"), ("file/x", "cannot be written"),
     ("pipe", "pipe is a pipe, and a folder is to be written"), ("to-itself", "is a link that leads to itself")],
)  # fmt: skip
def test_a_place_that_is_taken_is_refused(out: str, why: str) -> None:
    with pytest.raises(RunError, match=why) as caught:
        folder_to_write(out)
    assert caught.value.try_ == "another --out"


def test_a_file_that_is_read_back_goes_to_no_pipe_and_answers_do() -> None:
    with pytest.raises(RunError, match="pipe is a pipe, and a file is to be written"):
        file_to_write("pipe")
    with pytest.raises(RunError, match="empty exists"):
        file_to_write("empty")
    assert stream_to_write("pipe") == "pipe"
    with pytest.raises(RunError, match="file exists"):
        stream_to_write("file")


def test_what_is_written_replaces_a_file_and_not_the_link_to_it() -> None:
    write_out(Path("to-file"), "new")
    write_out(Path("to-nothing"), "new")
    assert (Path("file").read_text(), Path("new").read_text()) == ("new", "new")
    assert Path("to-file").is_symlink()
    assert Path("to-nothing").is_symlink()


def test_a_pipe_is_written_to_and_stays_one() -> None:
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(Path("pipe").read_text()))
    reader.start()
    write_out(Path("pipe"), "figures")
    reader.join()
    assert found == ["figures"]
    assert Path("pipe").is_fifo()


def test_a_device_is_written_to_and_stays_one() -> None:
    path = device(3)
    write_out(path, "figures")
    assert path.is_char_device()


def test_a_full_device_fails_the_job() -> None:
    path = device(7)
    with pytest.raises(JobError, match="no room is left for device") as caught:
        write_out(path, "figures")
    assert caught.value.exit_code == 1
    assert path.is_char_device()


def test_a_folder_in_the_place_of_a_file_is_a_sentence() -> None:
    with pytest.raises(RunError, match="empty cannot be written: Is a directory"):
        write_out(Path("empty"), "figures")
