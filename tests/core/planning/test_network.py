"""How many bytes does a node send in a step, how long does a step wait, and does the plan say so?"""

from typing import Any

import pytest

from qdist.core.machine.cluster import Network
from qdist.core.machine.world import World
from qdist.core.planning.network import NOTHING, Crossing, Exchanged, crossing_of
from tests.core.planning.test_nodes import laid, nodes
from tests.plans import gpus, planned

P = 1000
"""Adapter parameters."""


def crossing(world: World, **more: Any) -> Crossing:
    """What crosses of a replicated run on CPU ranks, or as told."""
    usual: dict[str, Any] = {
        "data_parallel": world.size, "stages": 1, "engine": "torch", "zero_stage": 0, "micro_batches": 4,
        "trained": P, "on_gpus": False,
    }  # fmt: skip
    return crossing_of(Exchanged(world=world, **{**usual, **more}))


def test_nothing_crosses_on_one_machine() -> None:
    assert crossing(World(4, 1)) == NOTHING


@pytest.mark.parametrize(
    ("world", "more", "sent", "waits"),
    [
        # A ring of 2 sends the gradients once, and a sum of the loss is waited for as well.
        (World(2, 1, 1, (1, 1)), {}, 4 * P, 2 + 2),
        # A ring of 4 ranks leaves each node once, whatever there is on it.
        (World(4, 1, 1, (2, 2)), {}, 1.5 * 4 * P, 6 + 6),
        (World(4, 1, 1, (3, 1)), {}, 1.5 * 4 * P, 6 + 6),
        # In 16 bits nodes of as many ranks each send half the bytes of nodes of one; others exchange rank by rank.
        (World(2, 1, 1, (1, 1)), {"narrow": True}, 2 * P, 2 + 2),
        (World(4, 1, 1, (2, 2)), {"narrow": True}, 2 * P, 6 + 2),
        (World(4, 1, 1, (3, 1)), {"narrow": True}, (3 + 3) / 4 * 2 * P, 6 + 4),
        # ZeRO 1 sums up once, ZeRO 2 every micro-batch, and both pass the parameters on; ZeRO 3 sums parts.
        (World(2, 1, 1, (1, 1)), {"engine": "deepspeed", "zero_stage": 1}, 4 * P + 2 * P, 6 + 3),
        (World(2, 1, 1, (1, 1)), {"engine": "deepspeed", "zero_stage": 2}, 4 * 4 * P + 2 * P, 6 + 9),
        (World(2, 1, 1, (1, 1)), {"engine": "deepspeed", "zero_stage": 3}, 4 * 2 * P + 2 * P, 6 + 5),
        # Two pipelines of two stages, each on its node: the same stages sum up, in as many rings.
        (World(2, 2, 1, (2, 2)), {"engine": "deepspeed", "stages": 2, "data_parallel": 2}, 4 * P, 18 + 2),
        # NCCL sums few numbers up in a tree over the nodes.
        (World(64, 1, 1, (8,) * 8), {"on_gpus": True}, 2 * 63 / 64 * 4 * P, 12 + 12),
    ],
)
def test_gradients_cross_between_nodes(world: World, more: dict[str, Any], sent: float, waits: float) -> None:
    found = crossing(world, **more)
    assert (found.gradient_bytes, found.gradient_waits) == (pytest.approx(sent), waits)
    assert (found.group_bytes, found.group_waits) == (0, 0)


@pytest.mark.parametrize(
    ("world", "share"),
    [
        # Three stages over two nodes, twice: the first two lie on both, the last one's sum stays on the second.
        (World(2, 3, 1, (2, 4)), 2 / 3),
        # The second group begins on the first node, which has the first two stages of both groups to itself.
        (World(2, 6, 1, (8, 4)), 4 / 6),
        # All stages lie on several nodes, some twice on one: each leaves it once.
        (World(4, 6, 1, (8, 8, 8)), 1.0),
    ],
)
def test_sums_of_a_stage_leave_a_node_once_and_only_where_others_have_it(world: World, share: float) -> None:
    stages = world.gpus_per_group
    found = crossing(world, stages=stages, data_parallel=world.groups)
    whole = 2 * (world.groups - 1) / world.groups * 4 * P
    assert found.gradient_bytes == pytest.approx(whole * share)


@pytest.mark.parametrize(
    ("world", "more", "sent", "waits"),
    [
        # A shard over 2 nodes gathers the other's half in each micro-batch.
        (World(1, 2, 1, (1, 1)), {"gathered_bytes": 600, "gathers": 6}, 4 * 300, 4 * 6),
        # Two groups that both lie on the second node's edges.
        (World(2, 2, 1, (1, 2, 1)), {"gathered_bytes": 600, "gathers": 6}, 2 * 4 * 300, 4 * 6),
        # One group that goes through the second node.
        (World(1, 4, 1, (1, 2, 1)), {"gathered_bytes": 600, "gathers": 6}, 4 * 450, 4 * 6 * 3),
        # Stages: the node in the middle sends activations on, and gradients back.
        (World(1, 2, 1, (1, 1)), {"stages": 2, "data_parallel": 1, "token_bytes": 50}, 4 * 50, 2 * 5),
        (World(1, 3, 1, (1, 1, 1)), {"stages": 3, "data_parallel": 1, "token_bytes": 50}, 2 * 4 * 50, 2 * 6),
    ],
)
def test_groups_that_span_nodes_send_weights_or_activations(
    world: World, more: dict[str, Any], sent: float, waits: float
) -> None:
    found = crossing(world, **more)
    assert (found.group_bytes, found.group_waits) == (sent, waits)


def test_a_plan_tells_what_the_network_adds() -> None:
    plan = laid(1, 1, placement="replicate", zero__stage=0)
    assert plan.network_bytes == 4 * plan.adapter_parameters
    assert plan.network == nodes(1, 1).network
    alone = planned("llama-7b", gpus(1, 80), {"global_batch": 2, "zero.stage": 0})
    step, alone_s = plan.step_tokens / plan.tokens_per_second, alone.step_tokens / alone.tokens_per_second
    assert plan.network_seconds == pytest.approx(plan.network_bytes / 1.25e9, rel=0.01)
    assert step > alone_s / 2 + plan.network_seconds


def test_a_plan_of_one_machine_has_no_network() -> None:
    plan = laid(4)
    assert (plan.network, plan.network_bytes, plan.network_seconds, plan.nodes) == (None, 0, 0.0, ())


def test_what_the_network_adds_to_cpu_ranks_is_known_though_their_speed_is_not() -> None:
    plan = laid(1, 1, gib=0)
    assert plan.tokens_per_second == 0
    assert plan.network_seconds == pytest.approx(plan.network_bytes / 1.25e9 + 4e-4)


def test_cpu_ranks_of_several_nodes_sum_gradients_up_once_a_step() -> None:
    assert planned("llama-7b", nodes(1, 1, gib=0), {"global_batch": 8, "micro_batch": 1}).engine == "torch"


def test_a_slow_network_is_slower() -> None:
    speeds = [
        planned(
            "llama-7b", nodes(2, 2, network=Network(bytes_s=rate, latency_s=1e-4, source="given"))
        ).tokens_per_second
        for rate in (1.25e8, 1.25e9, 1.25e10)
    ]
    assert speeds == sorted(speeds)
    assert speeds[0] < speeds[-1] / 2


def test_a_shard_over_a_slow_network_is_far_slower_than_within_a_node() -> None:
    within = laid(2, 2, placement="shard", gpus_per_group=2)
    across = laid(2, 2, placement="shard", gpus_per_group=4)
    assert across.network_bytes > within.network_bytes
    assert across.tokens_per_second < within.tokens_per_second
    others = [own for own in laid(2, 2, gib=40, model="llama-65b").alternatives if own.gpus_per_group == 4]
    assert [own.placement for own in others] == ["shard", "split"]
    assert all("groups of 4 span nodes, and others fit" in own.reason for own in others)
