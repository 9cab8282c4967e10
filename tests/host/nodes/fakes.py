"""Agents of hosts that are this machine; what they do is in `fake_agent`."""

import time
from collections.abc import Callable
from pathlib import Path

from qdist.core.nodes.hosts import Host
from qdist.core.nodes.job import NodeJob
from qdist.host.nodes.agents import Agent, Agents, Here
from qdist.host.nodes.ssh import Ssh
from qdist.host.run.rundir import RunDir


def agents_of(bed: Path, **does: str) -> Agents:
    """Agents of hosts by name, the first one here, and what each does: see `fake_agent`."""
    run = RunDir(bed / "run")
    made = []
    for node, name in enumerate(does):
        place = Here(name, module="fake_agent") if node == 0 else Ssh(Host(name=name), module="fake_agent")
        job = NodeJob(
            run=str(run.path), node=node, name=name, address="127.0.0.1", endpoints=("127.0.0.1:1",), least=1,
            most=len(does), token="0123456789abcdef", settings=does, attached=node == 0,
        )  # fmt: skip
        made.append(Agent(job, place))
    return Agents(run, made)


def until(agents: Agents, true: Callable[[], bool]) -> list[str]:
    """What is said until something is true."""
    lines, end = [], time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        agents.poll()
        lines += agents.new_lines()
    return lines


def starts(bed: Path, name: str) -> list[str]:
    path = bed / f"run/started-{name}"
    return path.read_text().splitlines() if path.exists() else []


def is_running(line: str) -> bool:
    try:
        return Path(f"/proc/{line.split()[0]}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
