"""Keeps what was measured of this machine's GPUs where the planner finds it."""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from qdist.core.errors import MachineError
from qdist.core.machine.cards import rates_of
from qdist.core.machine.cluster import Rates
from qdist.core.machine.measured import least, machine_key
from qdist.host.files import cache_dir, cache_path, write_atomic
from qdist.host.opening import read_typed


def known(names: Sequence[str], driver: str) -> Rates | None:
    """Rates of the GPUs with these names: measured here under this driver, else from the table of cards, else None."""
    return measured(names, driver) or tabled(names)


def measured(names: Sequence[str], driver: str) -> Rates | None:
    """What `keep` was given for the same cards; a file that cannot be read is as if it were not there."""
    try:
        return read_typed(_file(names, driver), Rates, MachineError)
    except MachineError:
        return None


def tabled(names: Sequence[str]) -> Rates | None:
    """What the table of cards says of the slowest of them; None where it lacks one."""
    found = [rates for name in dict.fromkeys(names) if (rates := rates_of(name)) is not None]
    return least(found) if found and len(found) == len(set(names)) else None


def keep(names: Sequence[str], driver: str, rates: Rates) -> Path:
    """Store rates for `known`; the file they are in."""
    path = _file(names, driver)
    cache_dir(path.parent.name)
    write_atomic(path, msgspec.json.format(msgspec.json.encode(rates), indent=1) + b"\n")
    return path


def _file(names: Sequence[str], driver: str) -> Path:
    return cache_path() / "rates" / (re.sub(r"[^\w.+-]+", "-", machine_key(names, driver)) + ".json")
