"""Is a rank that does not go on named, with what it is in, and are its stacks written?"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qdist.core.machine.environment import LAUNCH
from qdist.core.telemetry.heartbeat import Heartbeat, encode
from qdist.host.run.rundir import RunDir
from qdist.host.run.watchdog import Watchdog, environment_of, process_of, read_pulses, troubles

NOW = 1000.0


def pulse(rank: int, *, beat: float = 0.0, moved: float = 0.0, **fields: Any) -> Heartbeat:
    """beat, moved: seconds ago."""
    fields = {"pid": os.getpid(), "host": socket.gethostname(), "phase": "training", "step": 7, **fields}
    return Heartbeat(rank=rank, time=NOW - beat, moved=NOW - moved, **fields)


def blamed(*pulses: Heartbeat) -> list[int]:
    return [one.rank for one in troubles({each.rank: each for each in pulses}, now=NOW, after_s=30)]


def test_ranks_that_go_on_are_left_alone() -> None:
    assert blamed(pulse(0, moved=29), pulse(1, beat=29)) == []


def test_the_silent_come_before_those_that_wait_for_them() -> None:
    assert blamed(pulse(0, moved=40), pulse(1, beat=31, moved=41), pulse(2, moved=45)) == [1, 2, 0]


def test_among_the_waiting_the_one_that_is_behind_is_to_blame() -> None:
    waiting = [pulse(rank, moved=40, micro_batch=4, micro_batches=4) for rank in (0, 1)]
    assert blamed(*waiting, pulse(2, moved=39, micro_batch=2, micro_batches=4)) == [2, 0, 1]


@pytest.mark.parametrize("phase", ["starting", "loading", "saving", "finishing"])
def test_what_takes_long_without_saying_how_far_it_is_counts_only_when_silent(phase: str) -> None:
    assert blamed(pulse(0, moved=4000, phase=phase)) == []
    assert blamed(pulse(0, beat=31, moved=4000, phase=phase)) == [0]


def test_a_rank_that_has_ended_is_no_trouble() -> None:
    assert blamed(pulse(0, beat=500, moved=500, phase="ended")) == []


@pytest.mark.parametrize(
    ("one", "sentence"),
    [
        (
            pulse(1, beat=31, pid=2**22 + 1),
            "rank 1 has been silent for 31 s: its process is gone, last seen in forward and backward passes of step 7",
        ),
        (
            pulse(2, beat=90, host="node7", phase="loading", step=0),
            "rank 2 has been silent for 1 min 30 s: it was on node7, last seen loading the backbone",
        ),
        (
            pulse(3, moved=600, micro_batch=2, micro_batches=8),
            "rank 3 has not moved for 10 min 00 s: it is in forward and backward passes of step 7, micro-batch 2 of 8",
        ),
    ],
)
def test_a_sentence_says_who_since_when_and_in_what(one: Heartbeat, sentence: str) -> None:
    assert [str(trouble) for trouble in troubles({one.rank: one}, now=NOW, after_s=30)] == [sentence]


SLEEPER = """
import sys, time
from qdist.host.run.rundir import RunDir
from qdist.runtime.train.heartbeat import HeartbeatThread
beat = HeartbeatThread(RunDir(sys.argv[1]), int(sys.argv[2]))
def standing_still():
    time.sleep(60)
beat.move("training", 3, 1, 2)
standing_still()
"""


def test_a_stopped_process_is_named_and_leaves_its_stacks(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    watchdog = Watchdog(run, 1.5, ranks=2, launch="")
    ranks = [subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path), str(rank)]) for rank in (0, 1)]
    try:
        end = time.monotonic() + 20
        while [each.phase for each in read_pulses(run).values()] != ["training"] * 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        ranks[1].send_signal(signal.SIGSTOP)
        while process_of(read_pulses(run)[1]) != "stopped":
            assert time.monotonic() < end
        time.sleep(1.7)
        sentence = watchdog.stuck()
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert sentence.startswith("rank 1 has been silent for ")
    assert "its process is stopped" in sentence
    assert "; rank 0 stands still as well; " in sentence
    assert f"stacks of rank 0, 1 are in {run.stacks}" in sentence
    for rank in (0, 1):
        assert "standing_still" in run.stack_file(rank).read_text()
    assert process_of(read_pulses(run)[1]) == "gone"


def test_a_rank_of_an_earlier_launch_ends_once_another_goes_on_with_the_run(tmp_path: Path) -> None:
    run, holder = RunDir(tmp_path), {"pid": 1, "host": "here", "began": "", "launch": "first"}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    command = [sys.executable, "-c", SLEEPER, str(tmp_path), "0"]
    with subprocess.Popen(command, env={**os.environ, LAUNCH: "first"}, stdout=subprocess.PIPE, text=True) as rank:
        end = time.monotonic() + 20
        while not (pulses := read_pulses(run)):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert pulses[0].launch == "first"
        (tmp_path / ".lock").write_text(json.dumps({**holder, "launch": "second"}))
        said, _ = rank.communicate(timeout=20)
    assert (rank.returncode, said) == (
        1, "error: another launch goes on with this run: this rank of an earlier one ends\n",
    )  # fmt: skip


def test_beats_of_an_earlier_launch_are_no_word_of_this_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.pulses.mkdir()
    run.pulse_file(0).write_bytes(encode(pulse(0)))
    assert Watchdog(run, 1, ranks=1, launch="this").stuck() == ""


def test_ranks_that_give_no_beat_at_all_are_stuck_from_the_start_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what starts them waits for something, as torchrun does for a second node."""
    run, now = RunDir(tmp_path), [NOW]
    monkeypatch.setattr(time, "time", lambda: now[0])
    run.pulses.mkdir()
    watchdog = Watchdog(run, 150, ranks=3, launch="this")
    run.pulse_file(1).write_bytes(encode(pulse(1)))
    for second in range(5, 150, 5):
        now[0] = NOW + second
        assert watchdog.stuck() == ""
    now[0] = NOW + 150
    assert watchdog.stuck() == "ranks 0, 1, 2 gave no sign of life within 2 min 30 s of the start"


def test_ranks_that_were_suspended_with_the_watchdog_get_their_time_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = RunDir(tmp_path), [NOW]
    monkeypatch.setattr(time, "time", lambda: now[0])
    run.pulses.mkdir()
    watchdog = Watchdog(run, 60, ranks=1, launch="")
    run.pulse_file(0).write_bytes(encode(pulse(0, host="far")))
    now[0] = NOW + 2
    assert watchdog.stuck() == ""
    now[0] = NOW + 5000
    assert watchdog.stuck() == ""
    for second in range(1, 60):
        now[0] = NOW + 5000 + second
        assert watchdog.stuck() == ""
    now[0] = NOW + 5060
    assert watchdog.stuck() == (
        "rank 0 has been silent for 1 min 00 s: it was on far, last seen in forward and backward passes of step 7"
    )


def test_a_full_disk_costs_a_beat_and_not_the_others(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path), "0"]) as rank:
        end = time.monotonic() + 20
        while not read_pulses(run):
            assert time.monotonic() < end
            time.sleep(0.05)
        run.pulses.rename(tmp_path / "away")
        time.sleep(1.5)
        run.pulses.mkdir()
        while not read_pulses(run):
            assert time.monotonic() < end
            time.sleep(0.05)
        rank.kill()


def test_the_environment_of_a_rank_is_what_it_was_started_with(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "environ").write_bytes(b"A=1\0B=x=y\0\0")
    assert environment_of(pulse(0, pid=7), proc=tmp_path) == {"A": "1", "B": "x=y"}
    assert environment_of(pulse(0, pid=8), proc=tmp_path) == {}


def test_a_torn_beat_is_left_out(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.pulses.mkdir()
    run.pulse_file(0).write_bytes(encode(pulse(0)))
    run.pulse_file(1).write_bytes(encode(pulse(1))[:20])
    assert list(read_pulses(run)) == [0]


def test_nobody_is_stuck_where_the_recipe_says_to_wait_for_ever(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.pulses.mkdir()
    watchdog = Watchdog(run, 0, ranks=1, launch="")
    run.pulse_file(0).write_bytes(encode(Heartbeat(rank=0, pid=1, host="x", time=time.time() + 9)))
    assert watchdog.stuck() == ""
