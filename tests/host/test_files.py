"""Are files whole or absent, also when writing fails, and do locks hold between processes?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qdist.core.errors import RunError
from qdist.host import files
from qdist.host.files import cache_dir, locked, publish_folder, replace_folder, write_atomic

PRELUDE = "import sys\nfrom pathlib import Path\nfrom qdist.host.files import locked, write_atomic\n"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(("content", "data"), [("ü\n", "ü\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_what_is_written_is_there_and_nothing_beside_it(tmp_path: Path, content: str | bytes, data: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    write_atomic(path, content)
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_files_follow_the_umask(mask: int, file: int, folder: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "one", "1")
        (tmp_path / "beside").mkdir()
        (tmp_path / "beside/two").touch(mode=0o600)  # as safetensors does
        publish_folder(tmp_path / "beside", tmp_path / "final")
        with locked(tmp_path / "lock"):
            pass
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("one", "final/two", "lock", "final")]
    assert modes == [file, file, file, folder]


def test_a_write_that_fails_keeps_the_old_content(tmp_path: Path) -> None:
    """The limit on a file's size ends the write half way, as a full disk would."""
    path = tmp_path / "plan.json"
    path.write_text("old")
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_atomic(Path(sys.argv[1]), 'new' * 1000)"
    )
    done = python(code, str(path))
    assert "OSError: [Errno 27] File too large" in done.stderr
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_a_missing_folder_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "missing/plan.json", "new")


def test_a_published_folder_is_whole_under_its_final_name(tmp_path: Path) -> None:
    beside, final = tmp_path / ".beside", tmp_path / "step_000010"
    (beside / "inner").mkdir(parents=True)
    (beside / "inner/a").write_text("a")
    (beside / "DONE").touch()
    publish_folder(beside, final)
    assert not beside.exists()
    assert (final / "inner/a").read_text() == "a"
    assert (final / "DONE").is_file()


def test_publishing_never_replaces_a_folder_that_holds_something(tmp_path: Path) -> None:
    beside, final = tmp_path / ".beside", tmp_path / "adapter"
    for folder, text in ((beside, "new"), (final, "old")):
        folder.mkdir()
        (folder / "a").write_text(text)
    with pytest.raises(OSError, match="not empty"):
        publish_folder(beside, final)
    assert (final / "a").read_text() == "old"
    assert (beside / "a").read_text() == "new"


def test_a_lock_that_another_process_holds_refuses_with_the_message(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    code = "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RunError, match="runs/a is being trained") as caught,
            locked(path, busy="runs/a is being trained"),
        ):
            pass
        assert caught.value.try_ == "wait for it to end, or choose another --run"
        holder.kill()
        holder.communicate()
    with locked(path, busy="the lock ends with the process that held it"):
        pass


def test_a_lock_is_let_go_when_its_block_ends_or_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with locked(tmp_path / ".lock", busy="busy") as descriptor:
            os.fstat(descriptor)
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail()


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        ({"QDIST_CACHE": "mine"}, "mine"),
        ({"QDIST_CACHE": "mine", "XDG_CACHE_HOME": "xdg"}, "mine"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/qdist"),
        ({"HOME": "home"}, "home/.cache/qdist"),
        ({"HOME": "home", "XDG_CACHE_HOME": "", "QDIST_CACHE": ""}, "home/.cache/qdist"),
    ],
)
def test_caches_lie_where_the_user_said(
    variables: dict[str, str], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("QDIST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value) if value else "")
    assert cache_dir() == tmp_path / where
    assert cache_dir().is_dir()


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_that_is_replaced_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    beside, final = tmp_path / ".new", tmp_path / "adapter"
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for text in ("first", "second", "third"):
        beside.mkdir()
        (beside / "a").write_text(text)
        replace_folder(beside, final, aside=tmp_path / ".old")
        assert (final / "a").read_text() == text
        assert list(tmp_path.iterdir()) == [final]


def test_what_a_killed_process_was_writing_is_cleared_by_the_next_one(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom qdist.host import files\n"
        "files.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(Path(sys.argv[1]), 'half')"
    )
    python(code, str(tmp_path / "a.json"))
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.json.")
    (tmp_path / ".b.tmp").touch()
    write_atomic(tmp_path / "c.json", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.tmp", "c.json"]
