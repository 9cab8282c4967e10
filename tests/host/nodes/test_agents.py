"""Are the agents of several hosts started, heard, started again, stopped and killed as one?"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qdist.core.nodes.job import STILL_THERE, STOPPED
from qdist.host.nodes import agents as agents_module
from qdist.host.nodes.agents import Here
from tests.host.nodes.fakes import agents_of, is_running, starts, until


def test_agents_that_finish_end_with_0_and_what_they_all_say_is_told_once(bed: Path) -> None:
    with agents_of(bed, a="finish", b="finish") as agents:
        assert agents.wait() == 0
    assert agents.generation == 1
    assert agents.new_lines() in (["2 nodes work together"], ["b: 2 nodes work together"])


def test_no_token_is_on_a_command_line(bed: Path) -> None:
    with agents_of(bed, a="finish", b="finish") as agents:
        agents.wait()
    log = (bed / "ssh.log").read_text()
    assert "BatchMode=yes" in log
    assert "StrictHostKeyChecking" not in log
    assert "0123456789abcdef" not in log


def test_a_stopped_run_ends_with_its_own_code(bed: Path) -> None:
    with agents_of(bed, a="wait", b="wait") as agents:
        until(agents, lambda: agents.generation == 1)
        agents.stop()
        assert agents.wait() == STOPPED


def test_the_error_is_that_of_the_agent_that_failed(bed: Path) -> None:
    with agents_of(bed, a="finish", b="fail") as agents:
        agents.wait()
    assert str(agents.error) == "no room on b\n  try: make room there"


def test_an_agent_that_fails_before_there_is_a_plan_ends_those_that_wait_for_it(
    bed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents_module, "_UNBEGUN_S", 0.0)
    with agents_of(bed, a="fail", b="hang") as agents:
        agents.wait()
    assert agents.error
    assert agents.error.message == "no room on a"


def test_an_agent_that_crashes_is_told_with_its_last_line(bed: Path) -> None:
    with agents_of(bed, a="crash") as agents:
        assert agents.wait() == 1
    assert agents.error
    assert agents.error.message == "the agent of a ended with exit code 1: ValueError: a bug"


def test_killing_leaves_nothing_on_any_host(bed: Path) -> None:
    with agents_of(bed, a="wait", b="wait") as agents:
        until(agents, lambda: bool(starts(bed, "a") and starts(bed, "b")) and agents.generation == 1)
        agents.kill()
        assert agents.wait() == -signal.SIGKILL
        until(agents, lambda: not is_running(starts(bed, "a")[0]) and not is_running(starts(bed, "b")[0]))


def test_a_lost_agent_is_started_again_and_that_is_said_once(bed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents_module, "_AGAIN_S", 0.0)
    with agents_of(bed, a="wait", b="wait") as agents:
        until(agents, lambda: bool(starts(bed, "a") and starts(bed, "b")) and agents.generation == 1)
        (bed / "down").write_text("ssh: connect to host b port 22: No route to host\n")
        os.kill(int(starts(bed, "b")[0].split()[0]), signal.SIGKILL)
        tries = len((bed / "ssh.log").read_text().splitlines())
        lines = until(agents, lambda: len((bed / "ssh.log").read_text().splitlines()) > tries + 3)
        (bed / "down").unlink()
        lines += until(agents, lambda: len(starts(bed, "b")) > 1)
        (bed / "run/done").touch()
        assert agents.wait() == 0
    assert starts(bed, "b")[1].endswith("again")
    assert len([line for line in lines if "it is tried again every" in line]) == 1


def test_no_ssh_outlives_a_launcher_that_is_killed(bed: Path) -> None:
    code = (
        "from pathlib import Path; from tests.host.nodes.fakes import agents_of, until\n"
        f"with agents_of(Path({str(bed)!r}), a='wait', b='wait') as agents: until(agents, lambda: False)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code])
    try:
        started = wait_for_starts(bed, "ab")
    finally:
        launcher.kill()
        launcher.wait()
    end = time.monotonic() + 20
    while any(map(is_running, started)):
        assert time.monotonic() < end


def wait_for_starts(bed: Path, names: str) -> list[str]:
    """The first start of each agent."""
    end = time.monotonic() + 20
    while not all(starts(bed, name) for name in names):
        assert time.monotonic() < end
    return [starts(bed, name)[0] for name in names]


def test_two_nodes_of_one_number_in_one_run_directory_are_told() -> None:
    error = Here("b").explain(STILL_THERE, [])
    assert "b has the number of an agent that is at work in the run directory" in error.message
    assert error.try_ == "another --node-rank, or qdist stop of that run"
