"""Are measured pairs of hosts found again, for any of the hosts, and kept when others are measured?"""

from pathlib import Path

import pytest

from qdist.core.machine.cluster import Network
from qdist.core.nodes.pairs import Pair
from qdist.host.nodes.network import keep_pairs, measured_network


def pair(one: str, other: str, rate: float) -> Pair:
    return Pair(addresses=(one, other), latency_s=0.001, one_bytes_s=(rate, rate), four_bytes_s=(rate, rate))


def test_pairs_are_found_for_any_of_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDIST_CACHE", str(tmp_path))
    assert measured_network(["a", "b"]) is None
    keep_pairs([pair("a", "b", 9.0), pair("a", "c", 3.0)], "measured 2026-01-01")
    keep_pairs([pair("c", "b", 5.0), pair("b", "a", 8.0)], "measured 2026-02-02")
    assert measured_network(["b", "a"]) == Network(bytes_s=8.0, latency_s=0.001, source="measured 2026-02-02")
    assert measured_network(["a", "b", "c"]) == Network(bytes_s=3.0, latency_s=0.001, source="measured 2026-01-01")
    assert measured_network(["a", "d"]) is None
    assert measured_network(["a"]) is None
