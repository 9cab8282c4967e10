"""Does `qdist monitor` show a run from its folder, in whatever state the folder is?"""

import json
import math
import os
import pty
import select
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from qdist.cli.main import main
from qdist.cli.monitor import Screen
from qdist.core.telemetry.events import Event, encode
from qdist.core.telemetry.heartbeat import Heartbeat
from qdist.core.telemetry.heartbeat import encode as encode_pulse
from qdist.host.files import locked
from qdist.host.run import observer as look_module
from qdist.host.run.observer import RunObserver
from qdist.host.run.rundir import LOCK, RunDir
from qdist.host.run.watchdog import environment_of
from tests.plans import CPU, gpus, planned


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "r1")
    for folder in (run.events, run.logs, run.pulses):
        folder.mkdir(parents=True)
    (run.path / "plan.json").write_bytes(msgspec.json.encode(planned("smollm2-135m", CPU, {"gpus": 2})))
    os.utime(run.path / "plan.json", (time.time() - 600,) * 2)
    return run


def write(run: RunDir, *events: Event, torn: bytes = b"") -> None:
    for event in events:
        with open(run.event_file(event.rank), "ab") as file:
            file.write(encode(event))
    if torn:
        with open(run.event_file(0), "ab") as file:
            file.write(torn)


def beat(run: RunDir, rank: int, age_s: float) -> None:
    then = time.time() - age_s
    one = Heartbeat(
        rank=rank, pid=os.getpid(), host=socket.gethostname(), time=then, moved=then, phase="training", step=3
    )
    run.pulse_file(rank).write_bytes(encode_pulse(one))


def asked(run: RunDir, *options: str) -> Result:
    return CliRunner().invoke(main, ["monitor", str(run.path), *options], env={"COLUMNS": "80", "LINES": "24"})


STEPS = [Event(kind="step", step=step, total_steps=5, loss=2.0, tokens=64, seconds=1.0, time=1.0) for step in (1, 2)]


def test_one_view_is_printed_where_no_terminal_is(run: RunDir) -> None:
    write(run, *STEPS)
    for options in ((), ("--once",)):
        done = asked(run, *options)
        assert done.exit_code == 0
        assert "step 2/5" in done.output
        assert len(done.output.splitlines()) <= 24


def test_a_torn_last_line_is_waited_for(run: RunDir) -> None:
    write(run, *STEPS, torn=b'{"kind":"step","step":3,"lo')
    look = RunObserver(run)
    assert look.snapshot().fold.step == 2
    write(run, torn=b'ss":1.5}\n')
    assert look.snapshot().fold.step == 3


def test_json_is_one_object(run: RunDir) -> None:
    write(run, *STEPS)
    told = json.loads(asked(run, "--json").output)
    assert (told["step"], told["loss"], told["state"], len(told["ranks"])) == (2, 2.0, "killed", 2)


def test_json_has_null_where_a_number_is_none(run: RunDir) -> None:
    write(run, STEPS[0], Event(kind="step", step=2, total_steps=5, loss=math.nan, memory_bytes=7, time=1.0))
    told = json.loads(asked(run, "--json").output)
    assert (told["step"], told["loss"], told["ranks"][0]["peak_bytes"]) == (2, None, 7)
    assert told["warnings"][0].startswith("the loss is NaN or infinite at step 2")


def test_a_killed_run_says_how_it_goes_on_from_here(run: RunDir) -> None:
    write(run, *STEPS)
    told = json.loads(asked(run, "--json").output)
    assert (told["message"], told["try"]) == (
        "its launcher recorded no reason",
        f"qdist launch --resume --run {run.path}",
    )
    assert "killed: its launcher recorded no reason" in asked(run, "--once").output


def test_a_pipe_that_is_to_have_colour_gets_one_view_all_the_same(run: RunDir) -> None:
    write(run, *STEPS)
    done = CliRunner().invoke(main, ["monitor", str(run.path)], env={"FORCE_COLOR": "1", "TERM": "xterm"})
    assert "step 2/5" in done.output
    assert "\x1b[2J" not in done.output


def on_a_terminal(run: RunDir, term: str) -> bytes:
    """What the monitor wrote on a terminal until it ended, or until a SIGTERM after its first view."""
    write(run, *STEPS)
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "qdist", "monitor", str(run.path)]
    written = b""
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env={**os.environ, "TERM": term}) as process:
        while b"killed: " not in written:
            written += os.read(ours, 1 << 16)
        if term != "dumb":
            process.terminate()
        assert process.wait(20) == 0
    while select.select([ours], [], [], 0)[0]:
        written += os.read(ours, 1 << 16)
    assert termios.tcgetattr(its)[3] & termios.ICANON
    os.close(its)
    os.close(ours)
    return written


def test_a_monitor_that_is_ended_puts_the_terminal_back(run: RunDir) -> None:
    written = on_a_terminal(run, "xterm")
    assert b"\x1b[?1049l" in written
    assert b"\x1b[?25h" in written


def test_a_terminal_that_cannot_be_drawn_on_gets_one_view(run: RunDir) -> None:
    assert b"\x1b" not in on_a_terminal(run, "dumb")


def test_a_planned_run_is_waited_for(run: RunDir) -> None:
    assert "planned; waiting" in asked(run, "--once").output


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["monitor", str(tmp_path / "nothing"), "--once"])
    assert done.exit_code == 2
    assert "is not a run" in done.output


def test_a_rank_that_is_not_there_is_refused(run: RunDir) -> None:
    done = asked(run, "--rank", "7", "--once")
    assert done.exit_code == 2
    assert "--rank 0 to 1" in done.output


def test_a_rank_of_the_json_is_refused(run: RunDir) -> None:
    done = asked(run, "--rank", "1", "--json")
    assert done.exit_code == 2
    assert "--json tells of all ranks" in done.output


def test_the_log_of_a_rank_is_shown(run: RunDir) -> None:
    run.log_file(1).write_text("first\nsecond [bold]\x1b[2J\n")
    assert "second [bold]\n" in asked(run, "--rank", "1", "--once").output


def test_a_silent_rank_of_a_living_run_is_named_and_those_that_wait_are_not(run: RunDir) -> None:
    write(run, *STEPS)
    beat(run, 0, age_s=1)
    beat(run, 1, age_s=12)
    with locked(run.path / LOCK, busy=""):
        (trouble,) = RunObserver(run).snapshot().troubles
    assert trouble.startswith("rank 1 has been silent for 12 s")
    assert RunObserver(run).snapshot().troubles == ()


def test_beats_of_an_earlier_launch_are_no_word_of_this_one(run: RunDir) -> None:
    write(run, *STEPS)
    beat(run, 0, age_s=601)
    with locked(run.path / LOCK, busy=""):
        snapshot = RunObserver(run).snapshot()
    assert (snapshot.pulses, snapshot.troubles) == ({}, ())


@pytest.mark.parametrize("own", ["0", None])
def test_gpus_are_those_that_the_ranks_see_and_not_the_watcher(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    asked_for: list[str | None] = []

    class Cards:
        def __init__(self, environment: dict[str, str]) -> None:
            asked_for.append(environment.get("CUDA_VISIBLE_DEVICES"))

        def read(self) -> tuple[()]:
            return ()

    monkeypatch.setattr(look_module, "Readings", Cards)
    (run.path / "plan.json").write_bytes(msgspec.json.encode(planned("smollm2-135m", gpus(2, 80), {"gpus": 2})))
    os.utime(run.path / "plan.json", (1, 1))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": own} if own else {}
    with locked(run.path / LOCK, busy=""), subprocess.Popen(["sleep", "60"], env=environment) as rank:
        pulse = Heartbeat(rank=0, pid=rank.pid, host=socket.gethostname(), time=time.time())
        run.pulse_file(0).write_bytes(encode_pulse(pulse))
        while own and environment_of(pulse).get("CUDA_VISIBLE_DEVICES") != own:
            time.sleep(0.01)  # between a fork and its exec
        look = RunObserver(run)
        look.snapshot()
        look.snapshot()
        rank.kill()
    assert asked_for == [own or "5"]


def test_a_rank_that_stands_still_is_named_after_longer(run: RunDir) -> None:
    write(run, *STEPS)
    for rank in (0, 1):
        then = time.time() - (35 if rank else 20)
        one = Heartbeat(rank=rank, pid=os.getpid(), host="far", time=time.time(), moved=then, phase="training", step=3)
        run.pulse_file(rank).write_bytes(encode_pulse(one))
    with locked(run.path / LOCK, busy=""):
        (trouble,) = RunObserver(run).snapshot().troubles
    assert trouble.startswith("rank 1 has not moved for 35 s")


def test_a_run_planned_anew_is_seen_with_its_new_ranks(run: RunDir) -> None:
    look = RunObserver(run)
    assert look.snapshot().plan.world_size == 2
    (run.path / "plan.json").write_bytes(msgspec.json.encode(planned("smollm2-135m", CPU, {"gpus": 1})))
    os.utime(run.path / "plan.json", ns=(1, 1))
    assert look.snapshot().plan.world_size == 1


def test_keys_choose_pane_rank_pause_and_end() -> None:
    screen = Screen()
    screen.press("\t", 2)
    assert screen.pane == "ranks"
    screen.press("\x1b[Z", 2)
    assert screen.pane == "overview"
    screen.press("l", 2)
    assert (screen.pane, screen.rank) == ("log", 0)
    screen.press("l", 2)
    assert screen.rank == 1
    screen.press("0", 2)
    assert screen.rank == 0
    screen.press("p", 2)
    assert screen.paused
    assert screen.foot.startswith("PAUSED")
    screen.press("\x1b[A", 2)
    screen.press("x", 2)
    assert not screen.quit
    screen.press("q", 2)
    assert screen.quit
