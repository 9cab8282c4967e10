"""Are nodes that one does not have described by a number or a file, and mistakes in either named?"""

from typing import Any

import pytest

from qdist.core.errors import SpecError
from qdist.core.machine.cluster import Cluster, Machine, Network
from qdist.core.machine.nodes import DescribedNode, alike, described_nodes, network_of, number_of_nodes
from tests.plans import CPU, gpus

NETWORK = network_of("25Gbit,2s")


def machine(node: DescribedNode) -> Cluster:
    return gpus(node.gpus or 4, 48 if node.gpu_memory else 24)


def described(read: dict[str, Any]) -> Cluster:
    return described_nodes(read, "n.toml", machine, NETWORK)


def test_a_network_is_a_rate_and_perhaps_a_latency() -> None:
    assert Network(bytes_s=3.125e9, latency_s=2.0, source="given") == NETWORK
    assert network_of("1Gbit").latency_s == 1e-4


def test_nodes_are_alike() -> None:
    found = alike(gpus(4, 80), 3, 2, NETWORK)
    assert found.nodes == tuple(Machine(name=f"node{number}", gpus=2) for number in range(3))
    assert (len(found.gpus), found.network) == (6, NETWORK)
    assert [node.gpus for node in alike(CPU, 2, None, None).nodes] == [1, 1]


def test_one_node_is_one_machine() -> None:
    assert alike(gpus(4, 80), 1, None, NETWORK) == gpus(4, 80)


def test_a_file_has_a_table_for_each_node_or_for_several() -> None:
    found = described({"node": [{"name": "big", "gpus": 8, "gpu_memory": "48GiB"}, {"name": "s", "count": 2}, {}]})
    assert [(node.name, node.gpus) for node in found.nodes] == [("big", 8), ("s1", 4), ("s2", 4), ("node3", 4)]
    assert len({gpu.total_bytes for gpu in found.gpus}) == 2


@pytest.mark.parametrize(
    ("read", "message", "try_"),
    [
        ({}, r"n\.toml has no \[\[node\]\]", "[[node]] with gpus = 8 below it, for each node"),
        ({"node": []}, "has no", "[[node]] with gpus = 8 below it, for each node"),
        ({"node": {"gpus": 8}}, "has no", "[[node]] with gpus = 8 below it, for each node"),
        ({"nodes": [{}]}, "'nodes' is not known", "[[node]]"),
        ({"node": [{"gpu": 8}]}, r"a \[\[node\]\] has no 'gpu'", "gpus"),
        ({"node": [{"gpus": "8"}]}, r"a \[\[node\]\] cannot be {'gpus': '8'}: Expected", "gpus = 8"),
        ({"node": [8]}, r"a \[\[node\]\] cannot be 8", "gpus = 8"),
        ({"node": [{"gpus": 0}]}, ">= 1", "gpus = 8"),
        ({"node": [{"count": 500}, {"count": 13}]}, "has 513 nodes, and a plan is for 1 to 512", "fewer nodes"),
    ],
)
def test_mistakes_in_a_file_are_named(read: dict[str, Any], message: str, try_: str) -> None:
    with pytest.raises(SpecError, match=message) as refused:
        described(read)
    assert refused.value.try_ == try_


@pytest.mark.parametrize(("text", "count"), [("4", 4), ("512", 512), ("nodes.toml", None), ("4nodes", None)])
def test_nodes_are_a_number_or_a_file(text: str, count: int | None) -> None:
    assert number_of_nodes(text) == count


@pytest.mark.parametrize(("text", "try_"), [("0", "--nodes 2"), ("-3", "--nodes 2"), ("513", "--nodes 512")])
def test_a_number_of_nodes_has_limits(text: str, try_: str) -> None:
    with pytest.raises(SpecError, match="a plan is for 1 to 512 nodes") as refused:
        number_of_nodes(text)
    assert refused.value.try_ == try_
