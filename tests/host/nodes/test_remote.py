"""Are files of a run read and written over a gate as asked, and nothing outside its directory?"""

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdist.core.errors import RunError
from qdist.host.nodes.gate import Gate
from qdist.host.nodes.remote import Files, Missing, Refused
from qdist.host.nodes.words import MOST_BYTES

TOKEN = "0123456789abcdef"
HERE = "127.0.0.1"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "events").mkdir(parents=True)
    (folder / "events" / "rank000.jsonl").write_text("one\ntwo\n")
    (folder / "plan.json").write_text("{}")
    (tmp_path / "secret").write_text("not for others")
    return folder


@pytest.fixture
def gate(run: Path) -> Iterator[Gate]:
    with Gate((HERE, 0), TOKEN, store=None, folder=run, who={"run": "r", "name": "n"}) as gate:
        yield gate


@pytest.fixture
def files(gate: Gate) -> Iterator[Files]:
    files = Files((HERE, gate.port), TOKEN)
    yield files
    files.close()


def test_files_are_listed_read_and_written(files: Files, run: Path, tmp_path: Path) -> None:
    assert files.hello() == ("r", "n")
    assert files.list() == {"plan.json": 2, "events/rank000.jsonl": 8}
    assert files.list("events") == {"events/rank000.jsonl": 8}
    assert files.list("nowhere") == {}
    assert files.get("events/rank000.jsonl") == (b"one\ntwo\n", 8)
    assert files.get("events/rank000.jsonl", 4, 2) == (b"tw", 8)
    assert files.get("events/rank000.jsonl", 40) == (b"", 8)
    files.put("new/file", b"content")
    assert (run / "new" / "file").read_bytes() == b"content"
    files.put("new/file", run / "plan.json", flush=False)
    assert sorted(path.name for path in (run / "new").iterdir()) == ["file"]
    files.fetch("new/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"{}"
    files.publish("new", "published")
    assert files.list("published") == {"published/file": 2}


def test_large_files_come_whole(files: Files, run: Path, tmp_path: Path) -> None:
    content = random.Random(3).randbytes(5_000_001)
    (tmp_path / "large").write_bytes(content)
    files.put("large", tmp_path / "large")
    assert (run / "large").read_bytes() == content
    files.fetch("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_a_file_is_added_to_only_if_it_is_as_long_as_thought(files: Files, run: Path) -> None:
    assert files.append("logs/rank001.log", 0, b"a\n") == 2
    assert files.append("logs/rank001.log", 0, b"a\n") == 2, "sent twice, as after a broken connection"
    assert files.append("logs/rank001.log", 5, b"b\n") == 2
    assert files.append("logs/rank001.log", 2, b"b\n") == 4
    assert (run / "logs" / "rank001.log").read_text() == "a\nb\n"
    with pytest.raises(Refused, match="bytes at once"):
        files.append("logs/rank001.log", 4, b"x" * (MOST_BYTES + 1))
    assert files.append("logs/rank001.log", 4, b"c\n") == 6, "the connection goes on"


@pytest.mark.parametrize("left", ["half", "x" * 70_000])
def test_half_a_line_of_events_is_cut_before_the_next(files: Files, run: Path, left: str) -> None:
    path = run / "events" / "rank001.jsonl"
    path.write_text("one\n" + left)
    assert files.append("events/rank001.jsonl", 4, b"two\n") == 8
    assert path.read_text() == "one\ntwo\n"
    path.write_text(left)
    assert files.append("events/rank001.jsonl", -1, b"") == 0


@pytest.mark.parametrize(
    "path",
    ["../secret", "/etc/passwd", "events/../../secret", "", ".", "a//b", "a\0b", "x" * 1001, "link", "out/secret"],
)
def test_a_path_that_leads_out_is_refused(files: Files, run: Path, path: str) -> None:
    (run / "link").symlink_to(run.parent / "secret")
    (run / "out").symlink_to(run.parent)
    for ask in (
        lambda: files.get(path), lambda: files.put(path, b"x"), lambda: files.append(path, 14, b"x"),
        lambda: files.publish("events", path), lambda: files.publish(path, "new"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=r"is not a path inside the run directory|leads over a link"):
            ask()
    assert files.list() == {"plan.json": 2, "events/rank000.jsonl": 8}, "links are not listed"
    assert (run.parent / "secret").read_text() == "not for others"


def test_pipes_and_folders_are_no_files(files: Files, run: Path) -> None:
    os.mkfifo(run / "pipe")
    for path in ("pipe", "events"):
        with pytest.raises(Refused, match=f"{path}.* (is not a file|No such device|Is a directory)"):
            files.get(path)
        with pytest.raises(Refused):
            files.append(path, 0, b"x")
    assert files.hello() == ("r", "n")


def test_what_is_missing_and_what_the_disk_refuses_is_told(files: Files, run: Path) -> None:
    with pytest.raises(Missing, match=r"127\.0\.0\.1:\d+: nothing does not exist"):
        files.get("nothing")
    with pytest.raises(Missing):
        files.publish("nothing", "something")
    with pytest.raises(Refused, match=r"plan\.json/x: Not a directory|plan\.json/x: File exists"):
        files.put("plan.json/x", b"content")
    assert files.get("plan.json") == (b"{}", 2)


def test_a_broken_connection_is_made_anew_and_a_gate_that_is_gone_is_named(run: Path) -> None:
    first = Gate((HERE, 0), TOKEN, store=None, folder=run)
    files = Files((HERE, first.port), TOKEN)
    assert files.get("plan.json")[0] == b"{}"
    first.close()
    with Gate((HERE, first.port), TOKEN, store=None, folder=run):
        assert files.get("plan.json")[0] == b"{}"
    with pytest.raises(RunError, match=f"nothing listens at {HERE}:{first.port}"):
        files.get("plan.json")
    files.close()
    with pytest.raises(RunError, match="is closed"):
        files.get("plan.json")


def test_a_sender_that_ends_in_the_middle_leaves_nothing_behind(gate: Gate, run: Path) -> None:
    from qdist.host.nodes.door import connect
    from qdist.host.nodes.wire import Wire
    from qdist.host.nodes.words import Ask

    draw = random.Random(5)
    for verb in ("put", "append"):
        for _ in range(10):
            with connect((HERE, gate.port), TOKEN) as sock:
                Wire(sock).send(Ask(verb, path="plan.json", offset=2, size=100_000), b"x" * draw.randrange(99_999))
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b"", "the gate has seen the end"
    assert [path.name for path in run.iterdir() if path.is_file()] == ["plan.json"]
    assert (run / "plan.json").read_text() == "{}"


def test_a_gate_killed_while_it_writes_leaves_the_old_file_or_the_new(run: Path) -> None:
    """Killed before every access to a file, from the first to the last."""
    script, number, killed = Path(__file__).with_name("killed.py"), 0, True
    while killed:
        number += 1
        (run / "file").write_bytes(b"old")
        (run / "events" / "rank001.jsonl").write_bytes(b"one\nha")
        words = (sys.executable, str(script), "serve", str(run), str(number))
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            killed = is_lost(Files((HERE, int(server.stdout.readline())), TOKEN))
        assert server.returncode == (-signal.SIGKILL if killed else 0)
        assert (run / "file").read_bytes() in (b"old", b"new file")
        assert (run / "events" / "rank001.jsonl").read_bytes() in (b"one\nha", b"one\n", b"one\ntwo\n")
    assert number > 3
    assert sorted(path.name for path in run.iterdir() if path.is_file()) == ["file", "plan.json"], "no remains"
    assert (run / "file").read_bytes() == b"new file"


def is_lost(files: Files) -> bool:
    """Whether the gate was killed while it was written to."""
    try:
        files.put("file", b"new file")
        files.append("events/rank001.jsonl", 4, b"two\n")
    except RunError:
        return True
    finally:
        files.close()
    return False
