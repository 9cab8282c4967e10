"""Are rank, local rank, node, group and position of a process told apart, on one machine and on several?"""

import pytest

from qdist.core.errors import PlanError
from qdist.core.machine.world import LocalRank, Node, World, checked_world, used_gpus
from tests.plans import gpus, planned


@pytest.mark.parametrize(
    "world",
    [
        World(1, 1), World(4, 1), World(2, 4), World(1, 4, 4), World(4, 2, 1, (4, 4)), World(2, 4, 1, (4, 4)),
        World(4, 2, 2, (1, 1, 1, 1)), World(7, 2, 1, (8, 6)), World(3, 1, 1, (2, 1)), World(1, 6, 1, (2, 3, 1)),
    ],
)  # fmt: skip
def test_every_rank_is_found_again_by_its_place(world: World) -> None:
    assert checked_world(world) == world
    assert [world.rank_of(world.node_of(rank), world.local_rank_of(rank)) for rank in world.ranks] == list(world.ranks)
    places = {(world.group_of(rank), world.position_of(rank)) for rank in world.ranks}
    assert len(places) == world.size == len(world.ranks)
    for node, count in enumerate(world.ranks_of_nodes):
        there = world.ranks_on(Node(node))
        assert [world.node_of(rank) for rank in there] == [node] * count
        assert [gpu for rank in there for gpu in world.gpus_of(rank)] == list(range(count * world.gpus_per_rank))


def test_ranks_of_a_second_node_are_numbered_from_0_there() -> None:
    world = checked_world(World(groups=4, gpus_per_group=2, nodes=(2, 6)))
    last = world.ranks[-1]
    assert (last, world.node_of(last), world.local_rank_of(last), world.group_of(last), world.gpus_of(last)) == (
        7, 1, 5, 3, (5,),
    )  # fmt: skip
    assert world.rank_of(Node(1), LocalRank(0)) == 2


@pytest.mark.parametrize(
    ("world", "spans"),
    [
        (World(2, 4), False), (World(2, 4, 1, (4, 4)), False), (World(1, 8, 1, (4, 4)), True),
        (World(2, 3, 1, (4, 2)), True), (World(2, 2, 2, (1, 1)), False), (World(4, 1, 1, (3, 1)), False),
    ],
)  # fmt: skip
def test_a_world_tells_whether_its_groups_span_nodes(world: World, spans: bool) -> None:
    assert checked_world(world).spanning is spans


@pytest.mark.parametrize(
    ("groups", "size", "gpus", "used"),
    [
        (4, 2, (4, 4), (4, 4)), (3, 4, (8, 6), (8, 4)), (2, 3, (4, 5), (3, 3)), (1, 9, (4, 5), (4, 5)),
        (3, 1, (2, 1), (2, 1)),
    ],
)  # fmt: skip
def test_what_groups_leave_over_of_a_node_is_idle(
    groups: int, size: int, gpus: tuple[int, ...], used: tuple[int, ...]
) -> None:
    assert used_gpus(groups, size, gpus) == used


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (World(1, 8, 1, (8, 8)), "1 group of 8 GPUs cannot be divided over nodes of 8, 8 ranks"),
        (World(2, 1, 1, (2, 0)), "2 groups of 1 GPU cannot be divided over nodes of 2, 0 ranks"),
        (World(1, 3, 2), "3 GPUs of a group cannot be shared out to ranks of 2"),
    ],
)
def test_ranks_that_do_not_go_into_groups_or_nodes_are_refused(world: World, message: str) -> None:
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
