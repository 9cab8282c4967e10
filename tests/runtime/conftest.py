"""Tiny models, ranks that start at once, and a cache that is thrown away."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from qdist.core.planning.plan import digest
from qdist.host.launch import claim, prepare
from qdist.host.launch.agent import WORKER
from qdist.host.run.rundir import RunDir

TrainRun = Callable[[prepare.Launch], RunDir]
ForkRanks = Callable[..., list[int]]


class OnNode(NamedTuple):
    """Ranks of one node."""

    ranks: int
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    keeps: bool = False
    """Whether its first rank writes checkpoints, into a run directory of the node's own."""


ForkNodes = Callable[[str, Sequence[OnNode]], list[int]]
TrainOnNodes = Callable[[prepare.Launch, Sequence[RunDir]], None]


@pytest.fixture(autouse=True, scope="session")
def throwaway_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QDIST_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of operations on a few numbers: threads would only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def fork_nodes() -> Iterator[ForkNodes]:
    """Has `main` of a module called by forked CPU ranks of nodes; their exit codes."""
    script = Path(__file__).with_name("ranks.py")
    server = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert server.stdin is not None
    assert server.stdout is not None
    asked, answers = server.stdin, server.stdout

    def fork(module: str, nodes: Sequence[OnNode]) -> list[int]:
        order = {"module": module, "nodes": [node._asdict() for node in nodes]}
        asked.write(json.dumps(order) + "\n")
        asked.flush()
        codes: list[int] = json.loads(answers.readline())
        return codes

    yield fork
    asked.close()
    server.wait(30)
    answers.close()


@pytest.fixture(scope="session")
def fork_ranks(fork_nodes: ForkNodes) -> ForkRanks:
    """Has `main` of a module called by forked CPU ranks of one machine, with arguments; their exit codes."""
    return lambda module, ranks, *arguments: fork_nodes(module, [OnNode(ranks, tuple(map(str, arguments)))])


@pytest.fixture(scope="session")
def train(fork_ranks: ForkRanks) -> TrainRun:
    """Writes a job's run directory and trains it on forked CPU ranks; every rank must end well."""

    def run(job: prepare.Launch) -> RunDir:
        claim.write(job)
        codes = fork_ranks(WORKER, job.plan.world_size, job.run.path, "--digest", digest(job.plan))
        logs = "\n".join(job.run.log_file(rank).read_text()[-2000:] for rank, code in enumerate(codes) if code)
        assert not any(codes), f"ranks ended with {codes}\n{logs}"
        return job.run

    return run


@pytest.fixture(scope="session")
def train_on_nodes(fork_nodes: ForkNodes) -> TrainOnNodes:
    """Trains a job on forked CPU ranks of its plan's nodes, each with a run directory of its own."""

    def run(job: prepare.Launch, folders: Sequence[RunDir]) -> None:
        world, nodes = job.plan.world, []
        for node, folder in enumerate(folders):
            claim.write(job._replace(run=folder))
            words = (str(folder.path), "--digest", digest(job.plan))
            nodes.append(OnNode(world.ranks_of_nodes[node], words, keeps=True))
        codes = fork_nodes(WORKER, nodes)
        logs = "\n".join(
            folders[world.node_of(rank)].log_file(rank).read_text()[-2000:] for rank in world.ranks if codes[rank]
        )
        assert not any(codes), f"ranks ended with {codes}\n{logs}"

    return run
