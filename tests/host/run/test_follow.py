import os
import shutil
from pathlib import Path

import pytest

from qdist.core.errors import RunError
from qdist.core.telemetry.events import Event, encode
from qdist.core.telemetry.history import RunHistory
from qdist.host.run.observer import Follower


def line(step: int, *, rank: int = 0, time: float = 0.0) -> bytes:
    return encode(Event(kind="step", step=step, rank=rank, time=time))


def append(run: Path, rank: int, data: bytes) -> None:
    (run / "events").mkdir(exist_ok=True)
    with (run / "events" / f"rank{rank:03d}.jsonl").open("ab") as file:
        file.write(data)


def test_a_run_that_has_not_started_says_nothing(tmp_path: Path) -> None:
    assert Follower(tmp_path / "no such run").new_events() == []


def test_each_event_is_told_once(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    append(tmp_path, 0, line(1) + line(2))
    assert [event.step for event in follower.new_events()] == [1, 2]
    assert follower.new_events() == []
    append(tmp_path, 0, line(3))
    assert [event.step for event in follower.new_events()] == [3]


def test_a_line_being_written_waits_for_its_end(tmp_path: Path) -> None:
    follower, whole = Follower(tmp_path), line(2)
    append(tmp_path, 0, line(1) + whole[:9])
    assert [event.step for event in follower.new_events()] == [1]
    append(tmp_path, 0, whole[9:-1])
    assert follower.new_events() == []
    append(tmp_path, 0, whole[-1:])
    assert [event.step for event in follower.new_events()] == [2]


def test_ranks_are_told_by_time_and_may_appear_later(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    append(tmp_path, 1, line(1, rank=1, time=1.5))
    append(tmp_path, 0, line(1, time=1.0) + line(2, time=2.0))
    assert [(event.step, event.rank) for event in follower.new_events()] == [(1, 0), (1, 1), (2, 0)]
    append(tmp_path, 11, line(2, rank=11))
    assert [event.rank for event in follower.new_events()] == [11]


def test_a_clock_that_goes_back_does_not_reorder_a_rank(tmp_path: Path) -> None:
    append(tmp_path, 0, line(1, time=9.0) + line(2, time=3.0))
    append(tmp_path, 1, line(1, rank=1, time=5.0))
    assert [event.step for event in Follower(tmp_path).new_events() if event.rank == 0] == [1, 2]


def test_a_copy_beside_a_file_is_not_read(tmp_path: Path) -> None:
    append(tmp_path, 0, line(1))
    (tmp_path / "events" / "rank000-before.jsonl").write_bytes(b"no event\n")
    assert [event.step for event in Follower(tmp_path).new_events()] == [1]


def test_a_torn_tail_cut_off_by_a_resumed_rank_is_not_missed(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    append(tmp_path, 0, line(1) + line(2)[:9])
    follower.new_events()
    path = tmp_path / "events" / "rank000.jsonl"
    path.write_bytes(line(1))
    append(tmp_path, 0, line(2))
    assert [event.step for event in follower.new_events()] == [2]


def test_lines_that_are_no_events_are_left_out_and_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    follower = Follower(tmp_path, say=told.append)
    append(tmp_path, 3, line(1) + line(2))
    follower.new_events()
    append(tmp_path, 3, line(3) + b"garbage\n" + b"\0" * 300 + b"\n" + line(4))
    assert [event.step for event in follower.new_events()] == [3, 4]
    append(tmp_path, 3, b"[" * 100_000 + b"\n" + line(5))
    assert [event.step for event in follower.new_events()] == [5]
    assert told == [f"warning: {tmp_path}/events/rank003.jsonl: line 4 and 1 more is not an event, and is left out"]


def test_what_was_left_out_is_a_warning_of_the_fold(tmp_path: Path) -> None:
    fold = RunHistory()
    append(tmp_path, 0, line(1) + b"\0\n")
    Follower(tmp_path).fold_into(fold)
    assert fold.unread == f"{tmp_path}/events/rank000.jsonl: line 2 is not an event, and is left out"


def test_a_pipe_in_the_place_of_events_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    os.mkfifo(tmp_path / "events" / "rank000.jsonl")
    with pytest.raises(RunError, match=r"rank000\.jsonl is a pipe, not a file"):
        Follower(tmp_path).new_events()


def test_a_run_that_takes_the_folder_of_another_begins_anew(tmp_path: Path) -> None:
    follower, fold = Follower(tmp_path), RunHistory()
    append(tmp_path, 0, line(1) + line(2) + line(3))
    follower.fold_into(fold)
    shutil.rmtree(tmp_path / "events")
    append(tmp_path, 0, line(1))
    follower.fold_into(fold)
    assert list(fold.columns.step) == [1]
    append(tmp_path, 0, line(2))
    follower.fold_into(fold)
    assert list(fold.columns.step) == [1, 2]
