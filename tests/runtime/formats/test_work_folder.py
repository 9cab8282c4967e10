"""A folder is there whole or not at all, and a killed process's work is not lost."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from qdist.core.errors import JobError, ModelError, PlanError, RunError
from qdist.host import files
from qdist.host.files import require_space
from qdist.runtime.formats.work_folder import built, reserved


class Killed(BaseException):
    pass


def killed(out: Path, identity: str, *names: str) -> None:
    """A process that ends after writing some files."""
    with built(out, identity) as work:
        for name in names:
            (work / name).write_text("1")
        raise Killed


def test_what_is_there_at_the_end_is_what_was_written_and_nothing_of_the_work(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with built(out, "x") as work:
        (work / "one").write_text("1")
        (work / ".one.json").write_text("a record")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["one"]
    assert list(out.parent.iterdir()) == [out]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    places = [tmp_path / "file" / "out", Path("/proc/out")]
    for out in places:
        with pytest.raises(RunError, match=r"out cannot be written: .*: .*\n  try: another --out"), built(out, "x"):
            raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def full(out: Path) -> None:
    """A process whose disk another one fills."""
    with built(out, "x") as work:
        (work / "one").write_text("1")
        raise OSError(errno.ENOSPC, "No space left on device", str(work / "two"))


def test_a_disk_that_is_full_is_told_and_what_is_finished_stays(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"no room is left for .*out .*the same command goes on"):
        full(tmp_path / "out")
    assert (tmp_path / ".out.unfinished" / "one").is_file()


def test_what_cannot_be_read_is_another_matter(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), built(tmp_path / "out", "x"):
        (tmp_path / "source").read_text()
    with pytest.raises(RunError, match="cannot be written"), built(tmp_path / "out", "x") as work:
        (work / "no" / "folder").write_text("1")


@pytest.mark.parametrize(("identity", "left"), [("x", {".identity", "one", ".one.json"}), ("y", {".identity"})])
def test_the_same_goes_on_where_it_was_and_another_begins_anew(tmp_path: Path, identity: str, left: set[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        killed(out, "x", "one", ".one.json", ".two.unfinished")
    assert not out.exists()
    with built(out, identity) as work:
        assert {path.name for path in work.iterdir()} == left
    assert list(tmp_path.iterdir()) == [out]


def test_nothing_is_left_of_a_model_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="NaN"), built(tmp_path / "out", "x") as work:
        refused(work)
    assert list(tmp_path.iterdir()) == []


def refused(work: Path) -> None:
    (work / "one").write_text("1")
    raise ModelError("NaN")


def test_nothing_is_left_where_nothing_was_finished(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        killed(tmp_path / "out", "x", ".one.unfinished")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_refused_unless_it_is_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for name in ("file", "link"):
        with pytest.raises(RunError, match=r"exists\n  try: another --out"), reserved(tmp_path / name):
            pass
    with built(tmp_path / "empty", "x") as work:
        (work / "one").write_text("1")
    assert (tmp_path / "empty" / "one").is_file()


def test_two_do_not_write_the_same_folder(tmp_path: Path) -> None:
    with (
        reserved(tmp_path / "out"),
        pytest.raises(RunError, match=r"another process is writing .*out\n  try: wait"),
        reserved(tmp_path / "out"),
    ):
        pass


def test_a_disk_that_is_too_small_is_named_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=2 << 30)))
    require_space(tmp_path, 2 << 30, purpose="writing x")
    said = r"writing x needs 5.0 GiB in .*, which has 2.0 GiB free: 3.0 GiB are missing\n  try: --out on another disk"
    with pytest.raises(PlanError, match=said):
        require_space(tmp_path, 5 << 30, purpose="writing x")
