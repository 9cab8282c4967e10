"""Is the network between hosts measured pair by pair, kept on each, and is what cannot be measured named?"""

import socket
from pathlib import Path

import pytest

from qdist.core.errors import QdistError
from qdist.host.nodes.launching import Party, party_of
from qdist.host.nodes.measuring import measured_pairs
from qdist.host.nodes.network import measured_network
from qdist.host.nodes.speed import Part, Waiting, measure

HOSTS = "".join(f'[[host]]\nname = "{name}"\naddress = "127.0.0.{number}"\n' for number, name in enumerate("abc", 1))


@pytest.fixture
def party(bed: Path, monkeypatch: pytest.MonkeyPatch) -> Party:
    monkeypatch.setenv("QDIST_CACHE", str(bed / "cache"))
    (bed / "hosts.toml").write_text(HOSTS)
    return party_of(str(bed / "hosts.toml"))


def test_every_pair_is_measured_and_kept(party: Party) -> None:
    pairs = measured_pairs(party, seconds=0.05)
    assert {pair.addresses for pair in pairs} == {
        ("127.0.0.1", "127.0.0.2"), ("127.0.0.1", "127.0.0.3"), ("127.0.0.2", "127.0.0.3"),
    }  # fmt: skip
    assert all(rate > 0 for pair in pairs for rate in (*pair.one_bytes_s, *pair.four_bytes_s, pair.latency_s))
    network = measured_network(party.addresses)
    assert network is not None
    assert network.bytes_s == min(min(pair.one_bytes_s) for pair in pairs)


def test_a_host_that_cannot_be_asked_is_named(party: Party, bed: Path) -> None:
    (bed / "down").write_text("ssh: connect to host b port 22: Connection refused\n")
    with pytest.raises(QdistError, match="reached by ssh: ssh: connect to host b port 22: Connection refused"):
        measured_pairs(party, seconds=0.05)


def test_a_host_behind_a_firewall_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(QdistError, match=f"127.0.0.1 does not answer on port {port}: Connection refused"):
        measure(Part(address="127.0.0.1", token="0" * 32, peer=("127.0.0.1", port)))


def test_who_does_not_know_the_token_gets_nothing() -> None:
    waiting = Waiting("127.0.0.1", "0" * 32)
    try:
        with socket.create_connection(("127.0.0.1", waiting.port)) as stranger:
            stranger.sendall(b"1" * 32 + b"g")
            assert stranger.recv(1) == b""
    finally:
        waiting.close()
