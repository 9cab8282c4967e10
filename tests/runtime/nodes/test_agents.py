"""Agents of nodes as processes of this machine, each on a loopback address of its own, over one shared directory."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qdist.core.nodes.job import LEFT, STILL_THERE, STOPPED, AgentLine, NodeJob
from qdist.core.telemetry.nodes import NodeEvent
from qdist.host import children
from qdist.host.run.nodes import node_events
from qdist.host.run.observer import Follower
from qdist.host.run.rundir import RunDir
from qdist.host.run.watchdog import read_pulses
from tests.runtime.tiny import save_config

SETTINGS = {
    "load_format": "dummy", "seq_len": 16, "global_batch": 4, "micro_batch": 1,
    "lora": {"r": 2}, "train": {"save_steps": 4, "eval_steps": 0},
}  # fmt: skip
PATIENCE_S = 90.0
Agents = list["subprocess.Popen[bytes]"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Starts the agent of a node."""
    model, port, started = save_config(tmp_path / "model"), free_port(), Agents()

    def begin(node: int, *, nodes: int, steps: int, **more: Any) -> "subprocess.Popen[bytes]":
        usual: dict[str, Any] = {
            "run": str(tmp_path / "run"), "node": node, "name": "abc"[node], "address": f"127.0.0.{node + 1}",
            "endpoints": tuple(f"127.0.0.{each + 1}:{port}" for each in range(nodes)), "least": 1, "most": nodes,
            "token": "0123456789abcdef", "rejoin_s": 60.0,
            "settings": {**SETTINGS, "model": str(model), "steps": steps},
        }  # fmt: skip
        agent = subprocess.Popen(
            [sys.executable, "-P", "-m", "qdist.runtime.nodes.agent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=children.environment(GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES=""), start_new_session=True,
        )  # fmt: skip
        assert agent.stdin is not None
        agent.stdin.write(msgspec.json.encode(NodeJob(**{**usual, **more})) + b"\n")
        agent.stdin.flush()
        started.append(agent)
        return agent

    yield begin
    for agent in started:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
        agent.communicate()


def until(done: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)  # other processes work meanwhile


def said(agent: "subprocess.Popen[bytes]") -> list[AgentLine]:
    output, _ = agent.communicate(timeout=PATIENCE_S)
    return [msgspec.json.decode(line, type=AgentLine) for line in output.splitlines()]


def kinds(events: list[NodeEvent]) -> list[str]:
    return [event.kind for event in events]


def losses(run: RunDir) -> dict[int, list[float]]:
    """Every loss that a step had, in order: one that was done twice has two."""
    found: dict[int, list[float]] = {}
    for event in Follower(run.path).new_events():
        if event.kind == "step" and event.rank == 0 and event.loss is not None:
            found.setdefault(event.step, []).append(event.loss)
    return found


@pytest.mark.slow
def test_a_node_that_is_killed_is_named_and_the_other_goes_on_with_the_same_losses(
    tmp_path: Path, start: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    run = RunDir(tmp_path / "run")
    first, second = (start(node, nodes=2, steps=150) for node in range(2))
    until(lambda: len(losses(run)) > 6 and run.checkpoint_steps())
    assert start(1, nodes=2, steps=150).wait(PATIENCE_S) == STILL_THERE
    os.killpg(second.pid, signal.SIGKILL)
    lines = said(first)
    assert first.returncode == 0
    events = node_events(run)
    assert kinds(events) == ["formed", "lost", "formed", "finished"]
    before, lost, after, _ = events
    assert [member.ranks for member in before.members] == [(0,), (1,)]
    assert (lost.name, lost.seconds < 30) == ("b", True)
    assert [member.name for member in after.members] == ["a"]
    assert after.step in range(4, 150, 4)
    assert any("b has not been heard of for 10 s" in line.text for line in lines)
    found = losses(run)
    assert sorted(found) == list(range(1, 151))
    twice = {step: both for step, both in found.items() if len(both) > 1}
    assert all(step > after.step for step in twice)
    for one, other in twice.values():
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_a_request_to_stop_on_any_node_ends_all_with_a_checkpoint(
    tmp_path: Path, start: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    run = RunDir(tmp_path / "run")
    agents = [start(node, nodes=2, steps=100_000) for node in range(2)]
    until(lambda: losses(run))
    assert agents[1].stdin is not None
    agents[1].stdin.write(b"stop\n")  # qdist stop leaves a file, which both see on a shared disk
    agents[1].stdin.flush()
    for agent in agents:
        assert agent.wait(PATIENCE_S) == STOPPED
    assert kinds(node_events(run)) == ["formed", "stopped"]
    assert run.checkpoint_steps()
    ended = run.ended()
    assert ended is not None
    assert ended.state == "stopped"


@pytest.mark.slow
def test_a_node_that_is_told_to_leave_saves_first_and_the_other_goes_on(
    tmp_path: Path, start: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    run = RunDir(tmp_path / "run")
    first, second = (start(node, nodes=2, steps=150) for node in range(2))
    until(lambda: losses(run))
    second.terminate()  # as a scheduler does that takes the machine back
    assert second.wait(PATIENCE_S) == LEFT
    assert first.wait(PATIENCE_S) == 0
    before, after, _ = node_events(run)
    assert (before.kind, after.kind, [member.name for member in after.members]) == ("formed", "formed", ["a"])
    found = losses(run)
    assert {step: len(each) for step, each in found.items()} == dict.fromkeys(range(1, 151), 1), "nothing is done twice"


@pytest.mark.slow
def test_a_rank_that_fails_by_itself_ends_the_run_with_its_reason_and_the_name_of_its_node(
    tmp_path: Path, start: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    run = RunDir(tmp_path / "run")
    agents = [start(node, nodes=2, steps=100_000) for node in range(2)]
    until(lambda: losses(run))
    os.kill(read_pulses(run)[1].pid, signal.SIGKILL)
    for agent in agents:
        errors = [line for line in said(agent) if line.kind == "error"]
        assert agent.returncode == 1
        assert [error.text.startswith("b: rank 1 was killed by SIGKILL") for error in errors] == [True]
    assert kinds(node_events(run)) == ["formed", "failed"]
