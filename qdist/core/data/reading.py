"""How are the records of a run read: in which format, and under which names of columns and roles?"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

from qdist.core.data.record_turns import speakers_with
from qdist.core.errors import SpecError


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What is said about records before any of them is seen; by default, nothing."""

    format: str | None = None
    """A name of `records.FORMATS`; None to tell it from the keys."""
    columns: Mapping[str, str] = {}
    """Names of the data's columns by ours: {"instruction": "question"}."""
    roles: Mapping[str, str] = {}
    """Names of the data's roles by ours: {"user": "Customer"}."""


AS_FOUND = Reading()
"""Nothing is said: formats, columns and roles are told from the records."""


class _Names(Protocol):
    """The settings that name things: those of `spec.sections.Data`, which is above this room."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def roles(self) -> tuple[str, ...]: ...


def reading_of(data: _Names, record_format: str) -> Reading:
    """How a run's records are read.

    data: `spec.data`. record_format: `spec.format`, a name of `records.FORMATS` or auto.
    Raises SpecError for names that are not OURS=THEIRS, and for a role that is not ours.
    """
    roles = _named(data.roles, "data.roles", "user=Customer")
    speakers_with(roles)
    return Reading(
        format=None if record_format == "auto" else record_format,
        columns=_named(data.columns, "data.columns", "instruction=question"),
        roles=roles,
    )


def _named(pairs: Iterable[str], key: str, example: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and equals and theirs):
            raise SpecError(f"{key} has {pair!r}, which is not OURS=THEIRS", try_=f"--set {key}={example}")
        if ours in found:
            raise SpecError(f"{key} names {ours!r} twice: {found[ours]!r} and {theirs!r}", try_="one name for each")
        found[ours] = theirs
    return found
