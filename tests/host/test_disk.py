"""Is it known beforehand where nothing can be written?"""

import errno
import os
from pathlib import Path

import pytest

from qdist.core.errors import JobError, MachineError, PlanError
from qdist.host import files
from qdist.host.files import cache_dir, cache_path, nearest, obstacle, require_space, told_of_disks
from qdist.host.launch.refusals import refuse_unwritable_cache


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("folder", ""),
        ("folder/new/deep", ""),
        ("new", ""),
        ("file", "it is a file"),
        ("file/new", "HERE/file is a file"),
        ("link", "it is a link to nothing"),
        ("link/new", "HERE/link is a link to nothing"),
    ],
)
@pytest.mark.parametrize("probe", [False, True])
def test_what_is_in_the_way_of_a_folder_is_named(name: str, why: str, probe: bool, here: Path) -> None:
    before = sorted(here.rglob("*"))
    assert obstacle(here / name, probe=probe) == why.replace("HERE", str(here))
    assert sorted(here.rglob("*")) == before


def test_a_folder_without_permission_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """root may write anywhere, so the kernel is not asked."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert obstacle(here / "folder/new") == f"you may not write to {here / 'folder'}"


def test_a_place_where_no_folder_can_be_made_is_found_by_trying() -> None:
    assert obstacle(Path("/proc/new"), probe=True).endswith(": /proc")


def test_the_nearest_folder_that_is_there_is_found(here: Path) -> None:
    assert nearest(here / "folder/a/b") == here / "folder"
    assert nearest(Path("gone/deeper")) == Path.cwd()


def test_room_is_asked_of_the_disk_that_a_folder_will_be_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda folder: 2 << 30)
    require_space(here / "new", 2 << 30, purpose="packing x")
    with pytest.raises(PlanError, match=r"packing x needs 5.0 GiB in .*/new, which has 2.0 GiB free: 3.0 GiB are miss"):
        require_space(here / "new", 5 << 30, purpose="packing x")


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDIST_CACHE", str(here / "file"))
    assert cache_path() == here / "file"
    for refuse in (refuse_unwritable_cache, cache_dir, lambda: cache_dir("packed")):
        with pytest.raises(MachineError, match=r"the cache .*/file cannot be written: ") as caught:
            refuse()
        assert caught.value.try_.startswith("QDIST_CACHE=FOLDER")
        assert caught.value.exit_code == 2


def test_asking_where_the_cache_is_makes_none(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDIST_CACHE", str(here / "cache"))
    refuse_unwritable_cache(probe=True)
    assert not cache_path().exists()
    assert cache_dir("packed") == here / "cache/packed"
    assert (here / "cache/packed").is_dir()


@pytest.mark.parametrize(
    ("code", "where", "expected"),
    [
        (errno.ENOSPC, "runs/a/b", r"be written to \(No space left on device: runs/a/b\)\n  try: make room there"),
        (errno.EDQUOT, None, r"cannot be written to \(Disk quota exceeded\)\n  try: make room there"),
        (errno.EROFS, "out", r"\(Read-only file system: out\)\n  try: have it mounted for writing"),
        (errno.EIO, None, r"\(Input/output error\)"),
    ],
)
def test_a_disk_that_fails_meanwhile_is_said_in_a_sentence(code: int, where: str | None, expected: str) -> None:
    with pytest.raises(JobError, match=expected), told_of_disks():
        raise OSError(code, os.strerror(code), *([where] if where else []))


def test_other_errors_of_files_stay_as_they_are() -> None:
    with pytest.raises(FileNotFoundError), told_of_disks():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "a")
