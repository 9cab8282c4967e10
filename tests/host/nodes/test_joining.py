"""Is a node's agent started with what its flags, its launcher and the run say?"""

import socket
from pathlib import Path

import pytest

from qdist.core.errors import SpecError
from qdist.core.nodes.job import NodeJob
from qdist.core.nodes.places import Place, read_flags
from qdist.host.nodes.asked import Asked
from qdist.host.nodes.joining import joining, node_job

ASKED = Asked(Path("/runs/one"), {"model": "llama-7b"}, False, 2)


def test_a_node_meets_the_others_at_one_endpoint() -> None:
    place = Place(1, 4, 2, "127.0.0.1:29400", "--node-rank")
    assert node_job(ASKED, place, "x" * 16, say=lambda _: None) == NodeJob(
        run="/runs/one", node=1, name=f"{socket.gethostname()}-1", address="127.0.0.2", endpoints=("127.0.0.1:29400",),
        least=2, most=4, token="x" * 16, settings={"model": "llama-7b"}, gpus=2,
    )  # fmt: skip


def test_what_is_said_of_a_node_has_no_token() -> None:
    said: list[str] = []
    place = Place(0, 2, 2, "127.0.0.1:29400", "torchrun")
    with joining(ASKED, place, {"QDIST_TOKEN": "secret-secret-secret"}, say=said.append) as agents:
        assert agents.generation == 0
    name = f"{socket.gethostname()}-0"
    assert said == [f"node     {name} is node 0 of 2 (torchrun), 127.0.0.1", "meeting  at 127.0.0.1:29400"]


def test_no_agent_is_made_without_a_token() -> None:
    place = Place(0, 2, 2, "127.0.0.1:29400", "--node-rank")
    with pytest.raises(SpecError, match="no token"), joining(ASKED, place, {}, say=lambda _: None):
        pass


@pytest.mark.parametrize("words", [("2", 1, "a:1"), ("1:4", 0, "[fd00::1]:2")])
def test_a_node_that_was_stopped_says_how_it_takes_its_place_again(words: tuple[str, int, str]) -> None:
    flags = read_flags(*words)
    place = Place(words[1], flags.nodes or 0, flags.least or 0, words[2], "--node-rank")
    nnodes, rank, rendezvous = place.flags[1::2]
    assert read_flags(nnodes, int(rank), rendezvous) == flags
    assert place._replace(of="SLURM").flags == ()
