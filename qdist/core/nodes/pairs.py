"""How fast is the network between hosts, by what each pair of them measured?"""

from collections.abc import Iterator, Sequence

import msgspec

from qdist.core.machine.cluster import Network

MOST_ROUNDS = 15
"""Most rounds of pairs: up to 16 hosts each is measured with each other one, of more with 15 of the others."""


class Pair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What two hosts measured between them. Bytes/s are both ways: from the first to the second, and back."""

    addresses: tuple[str, str]
    latency_s: float
    """Seconds one way: half a round trip, the median of many."""
    one_bytes_s: tuple[float, float]
    """Bytes/s of one connection."""
    four_bytes_s: tuple[float, float]
    """Bytes/s of four connections together."""


def rounds_of(count: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Rounds of pairs of hosts by number, in each of which no host is in two: a tournament by the circle method."""
    places: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    for _ in range(min(len(places) - 1, MOST_ROUNDS)):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield tuple((min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None)
        places = [places[0], places[-1], *places[1:-1]]


def slowest_of(pairs: Sequence[Pair]) -> Pair:
    """The pair with the slowest connection; of equals the one with the longest way."""
    return min(pairs, key=lambda pair: (min(pair.one_bytes_s), -pair.latency_s))


def network_of(pairs: Sequence[Pair], *, source: str) -> Network:
    """The network as a plan takes it: a ring over all nodes is as fast as its slowest connection.

    source: where the figures come from.
    """
    return Network(
        bytes_s=min(min(pair.one_bytes_s) for pair in pairs),
        latency_s=max(pair.latency_s for pair in pairs),
        source=source,
    )
