"""The measured network between hosts: kept in the cache, and found again for any of the hosts."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from qdist.core.errors import MachineError
from qdist.core.machine.cluster import Network
from qdist.core.nodes.pairs import Pair, network_of
from qdist.host.files import cache_dir, cache_path, locked, write_atomic
from qdist.host.opening import read_typed


class Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All pairs that were measured, by their addresses: the last measurement of each counts."""

    pairs: dict[str, Pair] = {}
    dates: dict[str, str] = {}


def measured_network(addresses: Sequence[str]) -> Network | None:
    """The network between nodes, from pairs that `qdist doctor --hosts` measured; None where a node is in none."""
    kept, among = _kept(), set(addresses)
    found = {key: pair for key, pair in kept.pairs.items() if among.issuperset(pair.addresses)}
    if len(among) < 2 or {address for pair in found.values() for address in pair.addresses} != among:
        return None
    return network_of([*found.values()], source=min(kept.dates[key] for key in found))


def keep_pairs(pairs: Sequence[Pair], source: str) -> Path:
    """Keep measured pairs for `measured_network`; returns the file. source: 'measured' and the date."""
    cache_dir("network")
    with locked(_file().with_suffix(".lock")):
        kept = _kept()
        named = {" ".join(sorted(pair.addresses)): pair for pair in pairs}
        new = Kept(pairs=kept.pairs | named, dates=kept.dates | dict.fromkeys(named, source))
        write_atomic(_file(), msgspec.json.format(msgspec.json.encode(new), indent=1) + b"\n")
    return _file()


def _file() -> Path:
    return cache_path() / "network" / "pairs.json"


def _kept() -> Kept:
    try:
        return read_typed(_file(), Kept, MachineError)
    except MachineError:  # none yet, or of another qdist
        return Kept()
