"""What does a run on several nodes send between them in a step, and how long does a step wait for it?

Ranks are numbered node by node, so a ring over them leaves each node once: what a rank sends is what its node sends.
"""

from collections import Counter, defaultdict
from functools import lru_cache
from itertools import accumulate
from math import ceil, log2
from typing import Literal, NamedTuple

from qdist.core.machine.cluster import Network
from qdist.core.machine.world import Node, Rank, World, is_even

ASSUMED = Network(bytes_s=1.25e9, latency_s=1e-4, source="assumed")
"""The network between nodes of which nothing is known: 10 Gbit/s, 0.1 ms."""
WORTH_SAYING = 0.05
"""Share of a step above which the network is worth a larger batch."""
BUCKET = 50_000_000
"""Gradients that DeepSpeed sends at a time, as in `ds_configs/`."""
_SCALARS = {"torch": 1, "deepspeed": 3}
"""Sums of a few numbers that a step waits for: the loss; DeepSpeed's of the norm and of overflows besides."""


class Exchanged(NamedTuple):
    """What the ranks of a candidate exchange in an optimizer step."""

    world: World
    data_parallel: int
    stages: int
    engine: Literal["torch", "deepspeed"]
    zero_stage: int
    micro_batches: float
    trained: int
    """Adapter parameters, of all stages together."""
    narrow: bool = False
    """Whether gradients cross in 16 bits."""
    on_gpus: bool = True
    """Whether NCCL carries them, which sums small tensors up in a tree; gloo has rings."""
    gathered_bytes: float = 0.0
    """Bytes of packed weights that a sharded group gathers in a micro-batch."""
    gathers: int = 0
    token_bytes: int = 0
    """Bytes of a micro-batch's hidden states, where stages pass them on."""


class Crossing(NamedTuple):
    """What a step sends between nodes. Bytes are those of the node that sends most; waits are latencies in turn."""

    gradient_bytes: float = 0.0
    """For gradients and parameters of the adapter: once all micro-batches are computed, or of each, never beside it."""
    gradient_waits: float = 0.0
    group_bytes: float = 0.0
    """Between ranks of a group that spans nodes: gathered weights, or activations and their gradients."""
    group_waits: float = 0.0

    @property
    def bytes(self) -> float:
        return self.gradient_bytes + self.group_bytes

    def gradient_seconds(self, network: Network) -> float:
        """Seconds that the adapter's exchange adds to a step."""
        return self.gradient_bytes / network.bytes_s + self.gradient_waits * network.latency_s

    def group_seconds(self, network: Network) -> float:
        """Seconds that exchanges within groups take, if nothing is computed beside them."""
        return self.group_bytes / network.bytes_s + self.group_waits * network.latency_s


NOTHING = Crossing()


def crossing_of(own: Exchanged) -> Crossing:
    """What crosses between nodes in a step; nothing on one machine."""
    if len(own.world.ranks_of_nodes) < 2:
        return NOTHING
    sent, waits = _gradients(own)
    group_bytes, group_waits = _within_groups(own) if own.world.spanning else (0.0, 0.0)
    return Crossing(sent, waits, group_bytes, group_waits)


def _gradients(own: Exchanged) -> tuple[float, float]:
    """Bytes that a node sends for the adapter's state, and latencies that are waited for."""
    ranks = own.data_parallel
    scalars = _SCALARS[own.engine] * _waits_of_sum(own, own.world.size)
    if ranks == 1:
        return 0.0, scalars
    if own.narrow:
        sent, exchanging = _narrow(own)
        return sent, scalars + exchanging  # shares to all others at once, then a ring
    summed, passed_on = _waits_of_sum(own, ranks), ranks - 1
    one_way = 4 * own.trained * passed_on / ranks
    held = _share_that_leaves(own.world) if own.world.spanning and own.stages > 1 else 1.0
    if own.engine == "torch":
        return 2 * one_way * held, scalars + summed
    buckets = ceil(own.trained / BUCKET)
    if not own.zero_stage:
        return 2 * one_way * held, scalars + summed * buckets
    # DeepSpeed sums whole buckets up on all ranks, also where each keeps only its part of them (0.19).
    times = own.micro_batches if own.zero_stage > 1 and own.stages == 1 else 1
    each, waits = (one_way, passed_on) if own.zero_stage == 3 else (2 * one_way, summed)
    return (times * each + one_way) * held, scalars + (times * waits + passed_on) * buckets


@lru_cache(maxsize=64)
def _share_that_leaves(world: World) -> float:
    """Share of the stages whose sums over all groups leave the node that sends most; a node may hold all of one."""
    nodes = defaultdict(set)
    for rank in world.ranks:
        nodes[world.position_of(rank)].add(world.node_of(rank))
    shared = Counter(node for there in nodes.values() if len(there) > 1 for node in there)
    return max(shared.values(), default=0) / len(nodes)


def _narrow(own: Exchanged) -> tuple[float, int]:
    """Bytes that a node sends in 16 bits, and how many exchange: each sends its shares to all others, then the sums.

    Nodes of as many ranks each are one to the others: what their ranks hold is added up before, each for its part.
    """
    nodes = own.world.ranks_of_nodes
    ranks, there = (len(nodes), 1) if is_even(nodes) else (own.data_parallel, max(nodes))
    return 2 * own.trained * (there * (ranks - there) + ranks - 1) / ranks, ranks


def _waits_of_sum(own: Exchanged, ranks: int) -> int:
    """Latencies of a sum over all ranks: a ring's, or of NCCL a tree's over the nodes where that is less."""
    ring = 2 * (ranks - 1)
    return min(ring, 4 * ceil(log2(len(own.world.ranks_of_nodes)))) if own.on_gpus else ring


def _within_groups(own: Exchanged) -> tuple[float, float]:
    """Bytes that a node sends to others of the same group, and latencies, in all micro-batches of a step."""
    world, size = own.world, own.world.gpus_per_group
    edges = _edges(world)
    if own.stages > 1:  # what a stage computes goes on, and the gradient of it back
        most = max(before + behind for before, behind in edges)
        return most * own.micro_batches * own.token_bytes, 2 * (own.micro_batches + own.stages - 1)
    rings = max(_groups_on_edge(world, Node(node), *edge) for node, edge in enumerate(edges))
    gathered = own.micro_batches * own.gathered_bytes * (size - 1) / size
    return rings * gathered, own.micro_batches * own.gathers * (size - 1)


def _edges(world: World) -> list[tuple[bool, bool]]:
    """For each node whether its first group began on the node before, and its last goes on on the next."""
    begun = [world.position_of(Rank(first)) > 0 for first in accumulate(world.nodes[:-1], initial=0)]
    return list(zip(begun, [*begun[1:], False], strict=True))


def _groups_on_edge(world: World, node: Node, before: bool, behind: bool) -> int:
    """Groups of a node that have ranks on the node before, or behind."""
    there = world.ranks_on(node)
    alone = before and behind and world.group_of(there[0]) == world.group_of(there[-1])
    return 1 if alone else before + behind
