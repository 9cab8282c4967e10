"""Which machines take part in a run that is started over ssh: the hosts of a hosts.toml."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from qdist.core.errors import SpecError, nearest
from qdist.core.nodes.job import REJOIN_S
from qdist.core.spec.keys import known_keys
from qdist.core.spec.suggest import of_another_kind
from qdist.core.text import first_few

MOST_HOSTS = 1024
"""Most hosts of a run."""
_PORT = 29400
"""Port of the rendezvous, as torchrun has it."""
EXAMPLE = '[[host]] and name = "10.0.0.1" below it'
_SHELL = frozenset("'`\"$;&<>|(){}")
"""What ssh 9.6 and newer refuse in names: ssh before that hands them to the shell of a ProxyCommand with %h or %r."""
_PLAIN = "a name without spaces, quotes, signs of a shell or a leading -"
T = TypeVar("T")
_Text = Annotated[str, Meta(min_length=1)]
_Port = Annotated[int, Meta(ge=1, le=65535)]


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine of a run."""

    name: Annotated[_Text, Meta(description="What ssh calls it, and what sentences do: a name or an address.")]
    address: Annotated[
        _Text | None, Meta(description="Its address, to which the other hosts connect. Auto: what its name means.")
    ] = None
    gpus: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="GPUs, or CPU processes, of it. Auto: as the recipe says.")
    ] = None
    python: Annotated[_Text | None, Meta(description="The interpreter there. Auto: the path of this one.")] = None
    user: Annotated[_Text | None, Meta(description="The user there. Auto: as ssh is configured.")] = None
    port: Annotated[_Port | None, Meta(description="Port of ssh there. Auto: as ssh is configured.")] = None


class Hosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The machines of a run, the first of which serves the rendezvous while it is there."""

    host: tuple[Host, ...]
    least: Annotated[
        Annotated[int, Meta(ge=1)], Meta(description="Fewest hosts to go on with when others are lost.")
    ] = 1
    port: Annotated[_Port, Meta(description="Port on which a host lets the others in.")] = _PORT
    rejoin_seconds: Annotated[
        Annotated[float, Meta(gt=0)], Meta(description="How long to wait for hosts that the run cannot do without.")
    ] = REJOIN_S


def read_hosts(found: Mapping[str, Any], *, where: str) -> Hosts:
    """The hosts that a TOML file names. where: the file, for errors.

    Raises SpecError naming the key, with the nearest that there is, for what is no such file; for a host that is
    there twice; and for too many.
    """
    _refuse_unknown(found, Hosts, where)
    listed = found.get("host")
    if not isinstance(listed, list) or not listed or not all(isinstance(host, Mapping) for host in listed):
        raise SpecError(f"{where} names no hosts", try_=EXAMPLE)
    for number, host in enumerate(listed, start=1):
        _refuse_unknown(host, Host, f"host {number} of {where}")
    if len(listed) > MOST_HOSTS:
        raise SpecError(f"{where} names {len(listed):,} hosts, and a run has at most {MOST_HOSTS:,}", try_="fewer")
    hosts = _converted(found, where)
    _refuse_twice([host.name for host in hosts.host], "name", where)
    _refuse_twice([host.address for host in hosts.host if host.address], "address", where)
    if odd := next((name for host in hosts.host for name in (host.name, host.user) if name and _is_odd(name)), None):
        raise SpecError(f"{odd!r} in {where} is not a name that ssh takes", try_=_PLAIN)
    if hosts.least > len(hosts.host):
        raise SpecError(
            f"least={hosts.least} in {where}, which names {len(hosts.host)} hosts", try_=f"least = {len(hosts.host)}"
        )
    return hosts


def _is_odd(name: str) -> bool:
    """Whether ssh would take a name for a flag, or a shell or terminal for something else."""
    return name.startswith("-") or not name.isprintable() or any(sign.isspace() or sign in _SHELL for sign in name)


def _refuse_unknown(found: Mapping[str, Any], kind: type[msgspec.Struct], where: str) -> None:
    known = known_keys(kind)
    for key in found:
        if key not in known:
            raise SpecError(f"unknown key {key!r} in {where}", try_=nearest(key, known) or ", ".join(known))


def _converted(found: Mapping[str, Any], where: str) -> Hosts:
    for number, host in enumerate(found["host"], start=1):
        if "name" not in host:
            raise SpecError(f"host {number} of {where} has no name", try_='name = "10.0.0.1"')
        _convert(host, Host, f"of host {number} in {where}")
    return _convert(found, Hosts, f"in {where}")


def _convert(found: Mapping[str, Any], kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        reason, _, key = str(error).partition(" - at `$.")
        name = key.rstrip("`")
        raise of_another_kind(f"{name} {where}", found[name], reason, {}) from None


def _refuse_twice(names: list[str], what: str, where: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SpecError(f"{first_few(twice)} is the {what} of two hosts in {where}", try_="each host once")
