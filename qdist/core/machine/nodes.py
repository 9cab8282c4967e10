"""Which nodes is a plan for, and which network is between them? From a number, or the tables of a file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from qdist.core.errors import SpecError, nearest
from qdist.core.machine.cluster import MOST_RANKS, Cluster, Network, joined
from qdist.core.text import USUAL_DELAY, parse_delay, parse_rate

MOST_NODES = 512
"""Most nodes that a plan is made for."""


class DescribedNode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `[[node]]` of a file, or several alike."""

    count: Annotated[int, Meta(ge=1, le=MOST_NODES)] = 1
    """Nodes of this kind."""
    gpus: Annotated[int, Meta(ge=1, le=MOST_RANKS)] | None = None
    gpu_name: str | None = None
    gpu_memory: str | None = None
    host_memory: str | None = None
    name: str = ""


def network_of(text: str) -> Network:
    """The network that '25Gbit' or '25Gbit,0.1ms' describes.

    Raises SpecError for what is neither rate nor latency.
    """
    rate, _, delay = text.partition(",")
    bytes_s = parse_rate(rate, "network")
    try:
        latency_s = parse_delay(delay or USUAL_DELAY)
    except SpecError as error:
        raise SpecError(error.message, ways=[{"network": f"{rate.strip()},{USUAL_DELAY}"}]) from None
    return Network(bytes_s=bytes_s, latency_s=latency_s, source="given")


def number_of_nodes(text: str) -> int | None:
    """The number that `--nodes` gives; None where it names a file.

    Raises SpecError for a number that no plan is made for.
    """
    if not text.lstrip("+-").isdecimal():
        return None
    if not 1 <= (count := int(text)) <= MOST_NODES:
        raise SpecError(
            f"a plan is for 1 to {MOST_NODES} nodes, not {count:,}",
            ways=[{"nodes": MOST_NODES if count > 1 else 2}],
        )
    return count


def alike(machine: Cluster, count: int, gpus: int | None, network: Network | None) -> Cluster:
    """So many nodes of one kind. gpus: that the run may use of each; None for all, or for one CPU rank."""
    return _joined([machine] * count, [f"node{number}" for number in range(count)], [gpus] * count, network)


def described_nodes(
    read: Mapping[str, Any], source: str, machine: Callable[[DescribedNode], Cluster], network: Network | None
) -> Cluster:
    """The nodes of a file's `[[node]]` tables.

    source: the file's name, for errors. machine: a node as it is described, with what the command adds.
    Raises SpecError for a file without such tables, unknown keys and values, and too many nodes.
    """
    tables = read.get("node")
    if strange := [key for key in read if key != "node"]:
        raise SpecError(f"{source}: {strange[0]!r} is not known; nodes are [[node]] tables", try_="[[node]]")
    if not isinstance(tables, Sequence) or isinstance(tables, str) or not tables:
        raise SpecError(f"{source} has no [[node]]", try_="[[node]] with gpus = 8 below it, for each node")
    found = [each for table in tables for own in (_node(table, source),) for each in [own] * own.count]
    if len(found) > MOST_NODES:
        raise SpecError(f"{source} has {len(found):,} nodes, and a plan is for 1 to {MOST_NODES}", try_="fewer nodes")
    names = [_name(own, number) for number, own in enumerate(found)]
    made = {own: machine(own) for own in dict.fromkeys(found)}
    return _joined([made[own] for own in found], names, [own.gpus for own in found], network)


def _joined(
    machines: Sequence[Cluster], names: Sequence[str], gpus: Sequence[int | None], network: Network | None
) -> Cluster:
    """A single node is one machine."""
    if len(machines) == 1:
        return machines[0]
    return joined(machines, names, gpus, network)


def _name(own: DescribedNode, number: int) -> str:
    return f"{own.name}{number}" if own.name and own.count > 1 else own.name or f"node{number}"


def _node(table: Any, source: str) -> DescribedNode:
    """A table, checked. Raises SpecError naming the key."""
    try:
        return msgspec.convert(table, DescribedNode)
    except msgspec.ValidationError as error:
        known = [field.name for field in msgspec.structs.fields(DescribedNode)]
        strange = next((key for key in table if key not in known), None) if isinstance(table, Mapping) else None
        if strange is not None:
            guess = nearest(strange, known) or "gpus"
            raise SpecError(f"{source}: a [[node]] has no {strange!r}", try_=guess) from None
        raise SpecError(f"{source}: a [[node]] cannot be {table!r}: {error}", try_="gpus = 8") from None
