"""The agent tells ranks their places, ends all of them when one fails or it is asked to, and names the first failed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qdist.core.nodes.job import KEEPS
from qdist.host.launch import agent
from qdist.host.run.rundir import RunDir
from qdist.host.run.state import died

WORKER = """
import os, sys, time
from pathlib import Path
rank, folder = os.environ["RANK"], Path(sys.argv[1])
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
(folder / f"{rank}.new").write_text(" ".join(os.environ[name] for name in names))
os.rename(folder / f"{rank}.new", folder / rank)
"""
AGENT = """
import sys
from qdist.host.launch import agent
agent.WORKER = "stand_in"
agent.main()
"""


@contextmanager
def running(folder: Path, rest: str, *, ranks: int = 2) -> Iterator["subprocess.Popen[str]"]:
    """An agent over ranks that note their places and then run `rest`."""
    (folder / "stand_in.py").write_text(WORKER + rest)
    path = os.pathsep.join((str(folder), str(Path(agent.__file__).parents[3])))
    command = [sys.executable, "-c", AGENT, str(ranks), str(folder), "--digest", "d"]
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(*paths: Path) -> None:
    end = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"none of {paths} came"
        time.sleep(0.01)


@pytest.mark.parametrize(("said", "wanted"), [(None, agent.LOOPBACK), ("eth7", "eth7")])
def test_ranks_of_one_machine_speak_over_loopback_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, said: str | None, wanted: str
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if said:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", said)
    assert agent.variables_of(0, 2, ("127.0.0.1", 1))["GLOO_SOCKET_IFNAME"] == wanted


def test_one_rank_of_a_machine_keeps_checkpoints_whatever_the_shell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEEPS, "1")
    assert [agent.variables_of(rank, 2, ("127.0.0.1", 1))[KEEPS] for rank in range(2)] == ["0", "0"]


def test_ranks_know_their_places_and_end_well(tmp_path: Path) -> None:
    with running(tmp_path, "") as process:
        assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 0 2 2 127.0.0.1", "1 1 2 2 127.0.0.1"]


def test_ranks_train_unless_they_are_to_evaluate() -> None:
    words = ["run", "--digest", "d"]
    assert agent.started_with(words) == [agent.WORKER, *words]
    assert agent.started_with([*words, "--evaluate"]) == [agent.EVALUATOR, *words]


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("sys.exit(3)", "rank 1 ended with exit code 3"),
        ("os.kill(os.getpid(), 9)", "rank 1 was killed by SIGKILL, which is what Linux does to a process when memory"),
    ],
)
def test_one_that_fails_ends_the_others_and_is_named(tmp_path: Path, way: str, said: str) -> None:
    with running(tmp_path, f"{way} if rank == '1' else time.sleep(60)") as process:
        words = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    run = RunDir(tmp_path)
    run.logs.mkdir()
    (run.logs / "launcher.log").write_text(words)
    assert died(run, {}, 1).message.startswith(said)


def test_asked_to_end_it_asks_its_ranks_which_may_save_first(tmp_path: Path) -> None:
    saving = """
import signal
def save(*_): (folder / f"saved{rank}").touch(); sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / f"ready{rank}").touch()
time.sleep(60)
"""
    with running(tmp_path, saving) as process:
        wait_for(tmp_path / "ready0", tmp_path / "ready1")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()


def test_a_reserved_port_is_for_the_first_rank_alone() -> None:
    with agent._reserved() as kept, socket.socket() as other, socket.socket() as first:
        with pytest.raises(OSError, match="in use"):
            other.bind(kept.getsockname())
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind(kept.getsockname())
        first.listen()
