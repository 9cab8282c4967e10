"""Do nodes without a shared disk end up with the same lines, heartbeats, checkpoints and results?"""

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdist.core.errors import JobError, RunError
from qdist.host.nodes.gate import Gate
from qdist.host.nodes.mirror import Files, Mirror, fetch_checkpoint, send_checkpoint, send_history, unseen
from qdist.host.run.rundir import RunDir

TOKEN = "0123456789abcdef"
HERE = "127.0.0.1"


class Two:
    """Run directories of two nodes: that of the leader, which serves it, and that of a follower."""

    def __init__(self, folder: Path) -> None:
        self.leader, self.follower = RunDir(folder / "leader"), RunDir(folder / "follower")
        for run in (self.leader, self.follower):
            for inner in (run.path, run.events, run.logs, run.pulses, run.checkpoints):
                inner.mkdir()
        self.gate = Gate((HERE, 0), TOKEN, store=None, folder=self.leader.path)
        self.files = Files((HERE, self.gate.port), TOKEN, reach_s=1)

    def mirror(self, *ranks: int, every_s: float = 3600) -> Mirror:
        return Mirror(self.follower, self.files, ranks or (1,), every_s=every_s)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    two = Two(tmp_path)
    yield two
    two.files.close()
    two.gate.close()


def add(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_followers_lines_and_heartbeats_reach_the_leader_and_the_leaders_the_follower(two: Two) -> None:
    mirror = two.mirror(1, 2)
    for number in range(3):
        for rank in (1, 2):
            add(two.follower.event_file(rank), f"event {rank} {number}\n")
            add(two.follower.log_file(rank), f"log {rank} {number}\n")
            two.follower.pulse_file(rank).write_text(f"beat {rank} {number}")
        add(two.leader.event_file(0), f"event 0 {number}\n")
        add(two.leader.path / "nodes.jsonl", f"node {number}\n")
        mirror.work_once()
        assert mirror.problem == ""
        for path in (
            "events/rank001.jsonl",
            "logs/rank002.log",
            "pulse/rank001.json",
            "events/rank000.jsonl",
            "nodes.jsonl",
        ):
            assert (two.leader.path / path).read_text() == (two.follower.path / path).read_text()


def test_half_a_line_waits_for_its_end(two: Two) -> None:
    mirror = two.mirror()
    add(two.follower.event_file(1), "one\nha")
    mirror.work_once()
    assert two.leader.event_file(1).read_text() == "one\n"
    two.follower.event_file(1).write_text("one\n")  # as a resuming rank cuts it off
    add(two.follower.event_file(1), "two\n")
    mirror.work_once()
    assert two.leader.event_file(1).read_text() == "one\ntwo\n"


@pytest.mark.parametrize(
    ("source", "held", "position"),
    [
        (b"", b"", 0),
        (b"a\nb\n", b"", 0),
        (b"a\nb\n", b"a\n", 2),
        (b"a\nb\n", b"a\nb\n", 4),
        (b"a\nb\nc\n", b"a\nx\n", 2),
        (b"a\nb\n", b"a\nb\nx\n", 4),
        (b"b\nc\n", b"a\nb\nx\n", 2),
        (b"c\nd\n", b"a\nb\n", 0),
        (b"a\nb", b"a\nb\n", 2),
    ],
)
def test_lines_that_the_other_side_lacks_follow_the_last_one_it_has(source: bytes, held: bytes, position: int) -> None:
    assert unseen(source, held) == position


def test_a_later_generation_adds_to_what_earlier_ones_left_and_repeats_nothing(two: Two) -> None:
    two.leader.event_file(1).write_text("a 1\na 2\nb 3\n")  # b 3 is of a node that was rank 1 for a while
    two.follower.event_file(1).write_text("a 1\na 2\na 4\n")
    two.follower.event_file(0).write_text("x 1\nlost 2\n")  # the leader's file of a rank 0 that was another node
    two.leader.event_file(0).write_text("x 1\ny 2\n")
    for _ in range(2):  # a mirror of each generation
        mirror = two.mirror()
        mirror.work_once()
        mirror.work_once()
        assert mirror.problem == ""
    assert two.leader.event_file(1).read_text() == "a 1\na 2\nb 3\na 4\n"
    assert two.follower.event_file(0).read_text() == "x 1\nlost 2\ny 2\n"


def test_a_file_that_someone_else_changed_is_compared_again(two: Two) -> None:
    mirror = two.mirror()
    add(two.follower.event_file(1), "one\n")
    mirror.work_once()
    add(two.leader.event_file(1), "foreign\n")
    add(two.follower.event_file(1), "two\n")
    mirror.work_once()
    mirror.work_once()
    assert two.leader.event_file(1).read_text() == "one\nforeign\ntwo\n"


def test_files_of_many_blocks_are_carried_at_once(two: Two) -> None:
    add(two.follower.log_file(1), f"{'x' * 99_999}\n" * 100)
    two.mirror().work_once()
    assert two.leader.log_file(1).read_bytes() == two.follower.log_file(1).read_bytes()


def test_a_long_log_without_line_ends_is_carried_too(two: Two) -> None:
    add(two.follower.log_file(1), "x" * 9_000_000 + "\nend\n")
    mirror = two.mirror()
    mirror.work_once()
    assert two.leader.log_file(1).read_bytes() == two.follower.log_file(1).read_bytes()


def test_the_result_comes_after_the_adapter_that_it_speaks_of(two: Two) -> None:
    mirror = two.mirror()
    mirror.work_once()
    assert two.follower.result() is None
    (two.leader.adapter / "inner").mkdir(parents=True)
    (two.leader.adapter / "adapter_model.safetensors").write_bytes(b"tensors")
    (two.leader.adapter / "inner" / "x").write_text("y")
    (two.leader.path / "result.json").write_text('{"steps": 3}')
    mirror.work_once()
    assert two.follower.result() == {"steps": 3}
    assert (two.follower.adapter / "adapter_model.safetensors").read_bytes() == b"tensors"
    (two.leader.adapter / "adapter_model.safetensors").write_bytes(b"longer tensors")
    (two.leader.path / "result.json").write_text('{"steps": 6}')
    mirror.work_once()
    assert two.follower.result() == {"steps": 6}
    assert (two.follower.adapter / "adapter_model.safetensors").read_bytes() == b"longer tensors"
    assert [path.name for path in two.follower.path.iterdir() if path.name.startswith(".")] == []


def test_a_mirror_keeps_its_problem_and_goes_on_when_it_is_over(two: Two) -> None:
    mirror = two.mirror()
    add(two.follower.event_file(1), "one\n")
    two.leader.event_file(1).mkdir()
    add(two.leader.event_file(0), "zero\n")
    mirror.work_once()
    assert "Is a directory" in mirror.problem
    assert two.follower.event_file(0).read_text() == "zero\n", "the others are carried"
    two.leader.event_file(1).rmdir()
    mirror.work_once()
    assert (mirror.problem, two.leader.event_file(1).read_text()) == ("", "one\n")
    two.gate.close()
    mirror.work_once()
    assert "nothing listens at" in mirror.problem
    two.gate = Gate((HERE, two.gate.port), TOKEN, store=None, folder=two.leader.path)
    add(two.follower.event_file(1), "two\n")
    mirror.work_once()
    assert (mirror.problem, two.leader.event_file(1).read_text()) == ("", "one\ntwo\n")


def test_the_last_round_is_when_it_is_stopped(two: Two) -> None:
    mirror = two.mirror()
    mirror.start()
    add(two.follower.log_file(1), "the last words\n")
    mirror.stop()
    mirror.stop()
    assert two.leader.log_file(1).read_text() == "the last words\n"


class Counted(Mirror):
    """Tells of each round."""

    def __init__(self, two: Two) -> None:
        super().__init__(two.follower, two.files, (1,), every_s=0.001)
        self.worked = threading.Semaphore(0)

    def work_once(self) -> None:
        super().work_once()
        self.worked.release()


def test_a_mirror_works_by_itself(two: Two) -> None:
    mirror = Counted(two)
    mirror.start()
    assert mirror.worked.acquire(timeout=30)
    add(two.leader.event_file(0), "zero\n")
    assert all(mirror.worked.acquire(timeout=30) for _ in range(2)), "the first of them may have begun before"
    assert two.follower.event_file(0).read_text() == "zero\n"
    mirror.stop()


def test_history_goes_to_a_leader_that_has_missed_some(two: Two) -> None:
    two.follower.event_file(0).write_text("x 1\ny 2\n")
    (two.follower.path / "nodes.jsonl").write_text("formed\nlost\n")
    two.leader.event_file(0).write_text("x 1\nlost 2\n")
    send_history(two.files, two.follower)
    send_history(two.files, two.follower)
    assert two.leader.event_file(0).read_text() == "x 1\nlost 2\ny 2\n"
    assert (two.leader.path / "nodes.jsonl").read_text() == "formed\nlost\n"


def save(run: RunDir, step: int, *, size: int = 3000) -> Path:
    folder = run.checkpoint(step)
    folder.mkdir()
    (folder / "adapter.safetensors").write_bytes(b"a" * size)
    (folder / "held_out.json").write_text("{}")
    (folder / "DONE").write_text(json.dumps({"files": {"adapter.safetensors": [size, 1, 2]}}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_checkpoints_are_fetched_and_sent_whole(two: Two) -> None:
    save(two.leader, 10)
    assert fetch_checkpoint(two.files, two.follower, 10) == two.follower.checkpoint(10)
    assert fetch_checkpoint(two.files, two.follower, 10) == two.follower.checkpoint(10), "which is there"
    save(two.follower, 20)
    for _ in range(2):
        send_checkpoint(two.files, two.follower, 20)
    for step in (10, 20):
        assert contents(two.leader.checkpoint(step)) == contents(two.follower.checkpoint(step))
    for run in (two.leader, two.follower):
        assert run.checkpoint_steps() == [10, 20]
        assert len(list(run.checkpoints.iterdir())) == 2


def test_an_unfinished_checkpoint_is_replaced_and_never_sent(two: Two) -> None:
    save(two.leader, 10)
    for run in (two.leader, two.follower):
        (save(run, 20) / "DONE").unlink()
    (save(two.follower, 10) / "DONE").unlink()
    with pytest.raises(RunError, match="no complete checkpoint of step 20"):
        fetch_checkpoint(two.files, two.follower, 20)
    with pytest.raises(RunError, match="has no DONE"):
        send_checkpoint(two.files, two.follower, 20)
    fetch_checkpoint(two.files, two.follower, 10)
    assert contents(two.leader.checkpoint(10)) == contents(two.follower.checkpoint(10))
    save(two.follower, 30)
    save(two.leader, 30, size=5).joinpath("DONE").unlink()
    send_checkpoint(two.files, two.follower, 30)
    assert contents(two.leader.checkpoint(30)) == contents(two.follower.checkpoint(30))


def test_a_checkpoint_that_is_shorter_than_it_says_is_not_published(two: Two) -> None:
    (save(two.leader, 10) / "adapter.safetensors").write_bytes(b"a" * 2999)
    with pytest.raises(RunError, match=r"adapter\.safetensors .* 2,999 of 3,000 bytes came"):
        fetch_checkpoint(two.files, two.follower, 10)
    assert list(two.follower.checkpoints.iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_is_told(two: Two) -> None:
    save(two.leader, 10)
    two.follower.checkpoints.rmdir()
    two.follower.checkpoints.write_text("a file")
    with pytest.raises(JobError, match="the checkpoint of step 10 cannot be written"):
        fetch_checkpoint(two.files, two.follower, 10)


def test_a_node_killed_while_it_copies_leaves_no_half_checkpoint(two: Two) -> None:
    """Killed before every access to a file, from the first to the last."""
    script, number, code = Path(__file__).with_name("killed.py"), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        for run, step in ((two.leader, 10), (two.follower, 20)):
            shutil.rmtree(run.checkpoints)
            run.checkpoints.mkdir()
            save(run, step)
        number += 1
        words = (sys.executable, str(script), "copy", str(two.follower.path), str(number), str(two.gate.port))
        code = subprocess.run(words, check=False).returncode
        for run in (two.leader, two.follower):
            for path in run.checkpoints.glob("step_*"):
                assert set(contents(path)) == {"adapter.safetensors", "held_out.json", "DONE"}
    assert (code, two.leader.checkpoint_steps(), two.follower.checkpoint_steps()) == (0, [10, 20], [10, 20])
    assert number > 5
