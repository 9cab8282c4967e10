"""Is each host measured with each other one, and is the network as slow as its slowest connection?"""

from itertools import combinations

import pytest

from qdist.core.nodes.pairs import MOST_ROUNDS, Pair, network_of, rounds_of, slowest_of


@pytest.mark.parametrize("count", [2, 3, 4, 7, 16])
def test_each_pair_is_measured_once_and_no_host_is_in_two_pairs_at_a_time(count: int) -> None:
    rounds = [*rounds_of(count)]
    assert sorted(pair for each in rounds for pair in each) == sorted(combinations(range(count), 2))
    for each in rounds:
        hosts = [host for pair in each for host in pair]
        assert len(hosts) == len(set(hosts))


def test_of_many_hosts_each_is_measured_with_some() -> None:
    rounds = [*rounds_of(100)]
    assert len(rounds) == MOST_ROUNDS
    assert all(len(each) == 50 for each in rounds)


def pair(one: str, other: str, rate: float, latency_s: float) -> Pair:
    return Pair(addresses=(one, other), latency_s=latency_s, one_bytes_s=(rate, 2 * rate), four_bytes_s=(rate, rate))


def test_the_slowest_connection_and_the_longest_way_count() -> None:
    pairs = [pair("a", "b", 9.0, 0.001), pair("a", "c", 3.0, 0.002), pair("b", "c", 5.0, 0.004)]
    network = network_of(pairs, source="measured")
    assert (network.bytes_s, network.latency_s) == (3.0, 0.004)
    assert slowest_of(pairs).addresses == ("a", "c")
