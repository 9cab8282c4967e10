"""How does a plan lie on several nodes: ranks node by node, groups within nodes, memory and threads of each?"""

from typing import Any

import pytest

from qdist.core.errors import PlanError, QdistError, SpecError
from qdist.core.machine.cluster import Cluster, Network, joined
from qdist.core.machine.world import Node
from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.planning.plan import Plan, Source
from qdist.core.planning.planner import plan_once
from qdist.core.planning.process_memory import SECOND_COMMUNICATOR_BYTES, STAGE_LINK_BYTES
from qdist.core.spec.run_spec import nest, resolve
from qdist.core.text import GIB
from tests.plans import CPU, gpus, planned

NETWORK = Network(bytes_s=1.25e9, latency_s=1e-4, source="given")


def nodes(*counts: int, gib: float = 80, network: Network | None = NETWORK) -> Cluster:
    """Nodes of empty GPUs, or with `gib=0` of CPU ranks."""
    names = [f"node{index}" for index in range(len(counts))]
    clusters = [gpus(count, gib) if gib else CPU for count in counts]
    return joined(clusters, names, counts, network)


def laid(*counts: int, gib: float = 80, model: str = "llama-7b", **settings: Any) -> Plan:
    """A plan on such nodes."""
    own = {"global_batch": 2 * sum(counts)} | {key.replace("__", "."): value for key, value in settings.items()}
    return planned(model, nodes(*counts, gib=gib), own)


def plan_once_on(cluster: Cluster, settings: dict[str, Any]) -> Plan:
    """A plan whose refusal has untried ways."""
    config = config_of("llama-7b")
    source = Source(kind="dummy", path="", config=config, tokenizer="")
    spec = resolve({"steps": 5, "model": "llama-7b"}, nest(settings))
    return plan_once(spec, source, from_config(config, name="llama-7b"), cluster, None)


def test_ranks_are_numbered_node_by_node() -> None:
    plan = laid(2, 2)
    assert [(each.node, each.gpus) for each in plan.ranks] == [(0, (0,)), (0, (1,)), (1, (0,)), (1, (1,))]
    assert (plan.world_size, plan.world.nodes, plan.world.spanning) == (4, (2, 2), False)
    assert [plan.world.local_rank_of(rank) for rank in plan.world.ranks] == [0, 1, 0, 1]


def test_nodes_may_have_different_numbers_of_gpus() -> None:
    plan = laid(3, 1, placement="replicate")
    assert [each.node for each in plan.ranks] == [0, 0, 0, 1]
    assert plan.world.ranks_on(Node(1)) == (3,)


def test_a_run_of_one_node_is_that_of_one_machine() -> None:
    one = laid(4)
    assert (one.world.nodes, one.ranks) == ((), planned("llama-7b", gpus(4, 80), {"global_batch": 8}).ranks)


def test_gpus_are_those_of_each_node() -> None:
    assert laid(4, 4, gpus=2).world.nodes == (2, 2)
    assert laid(1, 1, gib=0, gpus=3, global_batch=12).world.nodes == (3, 3)
    with pytest.raises(PlanError, match="--gpus 3 of each node, but node1 has 2") as refused:
        laid(4, 2, gpus=3)
    assert refused.value.try_ == "--gpus 2"


def test_fewer_gpus_of_each_node_are_suggested_where_a_batch_cannot_be_spread_over_all() -> None:
    with pytest.raises(SpecError, match="global_batch=16 cannot be spread over 12 ranks") as refused:
        plan_once_on(nodes(6, 6), {"global_batch": 16})
    assert refused.value.ways == ({"global_batch": 24}, {"gpus": 4}, {"gpus": 2})


def test_cores_are_shared_by_the_ranks_of_a_node() -> None:
    assert laid(2, 2, gib=0).threads_per_rank == CPU.cpu_count // 2


def test_memory_of_cpu_ranks_is_that_of_their_node() -> None:
    assert laid(3, 3, gib=0, model="llama-7b", placement="replicate").world.nodes == (3, 3)
    with pytest.raises(QdistError, match=r"on 60 CPU ranks needs .* node0 has 256 GiB, no GPU"):
        laid(60, 60, gib=0, global_batch=120)


def test_groups_stay_within_nodes() -> None:
    plan = laid(4, 4, gib=24, model="llama-65b")
    assert not plan.world.spanning
    assert plan.gpus_per_group in (2, 4)


def test_groups_span_nodes_only_where_nothing_else_fits() -> None:
    plan = laid(1, 1, 1, 1, gib=24, model="llama-65b", global_batch=16)
    assert plan.world.spanning
    assert {each.group for each in plan.ranks} == {0}
    assert [each.position for each in plan.ranks] == [0, 1, 2, 3]


def test_a_named_placement_takes_whole_nodes_as_groups() -> None:
    within = laid(4, 4, placement="shard")
    assert (within.groups, within.gpus_per_group, within.world.spanning) == (2, 4, False)
    across = laid(1, 1, placement="shard")
    assert (across.groups, across.gpus_per_group, across.world.spanning) == (1, 2, True)
    named = laid(2, 2, placement="shard", gpus_per_group=4)
    assert (named.groups, named.world.spanning) == (1, True)


def test_what_a_group_size_leaves_over_of_a_node_is_idle() -> None:
    plan = laid(4, 3, placement="shard", gpus_per_group=2, global_batch=12)
    assert (plan.groups, plan.world.nodes) == (3, (4, 2))
    assert [each.gpus for each in plan.ranks if each.node == 1] == [(0,), (1,)]


def test_a_cap_holds_for_the_gpu_of_that_number_on_each_node() -> None:
    plan = laid(2, 2, max_memory="1=60GiB", placement="replicate")
    assert plan.world.nodes == (2, 2)
    with pytest.raises(PlanError, match="caps GPU 2, and the last of 2 GPUs is GPU 1"):
        laid(2, 2, max_memory="2=60GiB")


def test_one_process_is_not_on_several_nodes() -> None:
    with pytest.raises(SpecError, match=r"split\.schedule=sequential is one process, and the run is on 2 nodes"):
        laid(2, 2, split__schedule="sequential")


def test_rooms_are_those_of_the_gpus_that_are_used() -> None:
    """The second node's GPUs are larger; what is idle of the first is not counted among them."""
    mixed = joined([gpus(3, 24), gpus(2, 80)], ["a", "b"], [None, None], NETWORK)
    plan = planned("llama-7b", mixed, {"placement": "shard", "gpus_per_group": 2, "global_batch": 8})
    assert plan.world.nodes == (2, 2)
    assert all(each.expected[0].required < 24 * GIB for each in plan.ranks)


@pytest.mark.parametrize(("counts", "communicators"), [((1, 1), 0), ((2, 2), 2), ((3, 1), 0)])
def test_gradients_in_16_bits_take_links_and_on_even_nodes_communicators(
    counts: tuple[int, ...], communicators: int
) -> None:
    plain, narrow = (
        laid(*counts, placement="replicate", zero__stage=0, optim__reduce_dtype=dtype).ranks[0].expected[0]
        for dtype in ("float32", "bfloat16")
    )
    links = STAGE_LINK_BYTES + communicators * SECOND_COMMUNICATOR_BYTES
    assert narrow.context - plain.context == links
