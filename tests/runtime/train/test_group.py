"""Ranks listen on the address they are given and on no other, and meet in a store that outlives their generation."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from qdist.host.launch import claim
from qdist.host.run.rundir import RunDir
from qdist.runtime.train.group import store_of
from tests.runtime.conftest import ForkNodes, OnNode
from tests.runtime.tiny import dummy_job, save_config

LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F")
"""127.0.0.1 as /proc/net/tcp and tcp6 have it."""
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(tmp_path_factory.mktemp("model"))


def written(model: Path, run: Path, **settings: Any) -> RunDir:
    job = dummy_job(model, run, gpus=2, **settings)
    claim.write(job)
    return job.run


def found_by(fork_nodes: ForkNodes, run: RunDir, environment: dict[str, str]) -> list[dict[str, Any]]:
    codes = fork_nodes("tests.runtime.train.group_ranks", [OnNode(2, (str(run.path),), ON_LOOPBACK | environment)])
    assert codes == [0, 0]
    return [json.loads((run.path / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.skipif(sys.platform != "linux", reason="sockets are read from /proc")
@pytest.mark.parametrize("stage", [0, 2])
def test_ranks_of_one_machine_listen_on_loopback_alone(
    fork_nodes: ForkNodes, model: Path, tmp_path: Path, stage: int
) -> None:
    found = found_by(fork_nodes, written(model, tmp_path / "run", zero__stage=stage), {})
    assert [(own["ranks"], own["processes"]) for own in found] == [(2, 2)] * 2
    listened = [address for own in found for address in own["addresses"]]
    assert len(listened) > 1  # rank 0's store, and gloo
    assert set(listened) <= set(LOOPBACK)


def test_generations_meet_in_one_store_without_reading_each_others_words(
    fork_nodes: ForkNodes, model: Path, tmp_path: Path
) -> None:
    run = written(model, tmp_path / "run")
    store, port = served()
    stores = []
    for generation in ("1", "2"):
        place = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        place |= {"TORCHELASTIC_RESTART_COUNT": generation}
        found = found_by(fork_nodes, run, place)
        assert [each["ranks"] for each in found] == [2, 2]
        stores.append(store_of({**place, "MASTER_ADDR": "127.0.0.1", "RANK": "0"}))
    stores[0].set("word", "old")
    assert (stores[0].check(["word"]), stores[1].check(["word"])) == (True, False)
    assert store.num_keys() > 0


def served() -> tuple[dist.TCPStore, int]:
    """A store as an agent serves it, and its port."""
    own = socket.socket()
    own.bind(("127.0.0.1", 0))
    port = own.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, is_master=True, master_listen_fd=own.detach(), wait_for_workers=False), port
