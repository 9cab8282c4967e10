"""Are rank, local rank, node, group and position of a process told apart, on one machine and on several?"""

import pytest

from qdist.core.errors import PlanError
from qdist.core.machine.world import LocalRank, Node, World, checked_world
from tests.plans import gpus, planned


@pytest.mark.parametrize(
    "world",
    [World(1, 1), World(4, 1), World(2, 4), World(1, 4, 4), World(4, 2, 1, 2), World(2, 4, 1, 2), World(4, 2, 2, 4)],
)
def test_every_rank_is_found_again_by_its_place(world: World) -> None:
    assert checked_world(world) == world
    assert [world.rank_of(world.node_of(rank), world.local_rank_of(rank)) for rank in world.ranks] == list(world.ranks)
    places = {(world.group_of(rank), world.position_of(rank)) for rank in world.ranks}
    assert len(places) == world.size == len(world.ranks)
    on_one_node = [gpu for rank in world.ranks if world.node_of(rank) == 0 for gpu in world.gpus_of(rank)]
    assert on_one_node == list(range(world.groups * world.gpus_per_group // world.nodes))


def test_ranks_of_a_second_node_are_numbered_from_0_there() -> None:
    world = checked_world(World(groups=4, gpus_per_group=2, nodes=2))
    last = world.ranks[-1]
    assert (last, world.node_of(last), world.local_rank_of(last), world.group_of(last), world.gpus_of(last)) == (
        7, 1, 3, 3, (3,),
    )  # fmt: skip
    assert world.rank_of(Node(1), LocalRank(0)) == 4


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (World(1, 8, 1, 2), "1 group of 8 GPUs cannot be divided over 2 nodes"),
        (World(3, 2, 1, 2), "3 groups of 2 GPUs cannot be divided over 2 nodes"),
        (World(1, 3, 2), "3 GPUs of a group cannot be shared out to ranks of 2"),
    ],
)
def test_groups_that_would_span_nodes_are_refused(world: World, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        checked_world(world)


@pytest.mark.parametrize(
    "settings", [{}, {"placement": "shard"}, {"placement": "split"}, {"split.schedule": "sequential"}]
)
def test_a_plan_lies_in_its_world(settings: dict[str, str]) -> None:
    plan = planned("llama-7b", gpus(4, 24), settings)
    assert plan.world.size == plan.world_size
    assert [(each.rank, each.node, each.gpus) for each in plan.ranks] == [
        (rank, 0, plan.world.gpus_of(rank)) for rank in plan.world.ranks
    ]
