"""What this machine is to a run's other nodes: who started this process here, its name, and its address."""

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from qdist.core.errors import RunError
from qdist.core.nodes.places import NodeFlags, Place, host_and_port, place_of, program_names, stale_line, stale_names
from qdist.host.nodes.addresses import is_own

PATIENCE_S = 300.0
"""Seconds to wait for the name of the first node: in a cluster it is known once that node has started."""
_AGAIN_S = 1.0
_ELSEWHERE = "192.0.2.1"
"""An address of no machine (RFC 5737), to ask which address leads out of this one; nothing is sent to it."""
PROC = Path("/proc")


def ancestors(proc: Path = PROC) -> list[frozenset[str]]:
    """Names of the processes above this one, its parent's first; those that this user may not see are left out.

    proc: where the kernel tells of processes.
    """
    found, process, seen = [], "self", {"0"}
    while process not in seen:
        seen.add(process)
        try:
            comm, parent = _named(proc / process / "stat")
            words = (proc / process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (OSError, ValueError):
            break
        found.append(program_names(comm, words[:-1]))
        process = parent
    return found[1:]


def _named(stat: Path) -> tuple[str, str]:
    """A process's name, which may hold spaces and parentheses, and its parent's number."""
    text = stat.read_bytes().decode(errors="replace")
    first, last = text.index("("), text.rindex(")")
    return text[first + 1 : last], text[last + 1 :].split()[1]


def place_here(flags: NodeFlags, environ: Mapping[str, str], *, proc: Path = PROC) -> tuple[Place | None, str]:
    """Where this process is in a run of several nodes, or None; and a line on variables that are not obeyed, if any."""
    above = ancestors(proc)
    place = place_of(flags, environ, above, host=socket.gethostname())
    return place, stale_line(stale_names(environ, above), place)


def stale_here(environ: Mapping[str, str], *, proc: Path = PROC) -> str:
    """A line on variables that a run on this machine alone does not obey; empty if there are none."""
    return stale_line(stale_names(environ, ancestors(proc)), None)


def meeting(
    place: Place,
    *,
    say: Callable[[str], None],
    patience_s: float = PATIENCE_S,
    wait: Callable[[float], None] = time.sleep,
) -> tuple[str, str]:
    """This machine's address towards the rendezvous, and the rendezvous as HOST:PORT.

    The name of another machine stays a name: it may have another address when it is back. That of this machine becomes
    its address.
    Raises RunError if the name is not known after `patience_s`, or is not reachable by others.
    """
    host, port = host_and_port(place.rendezvous)
    there = _resolved(host, port, say=say, patience_s=patience_s, wait=wait)
    if not is_own(there):
        return _towards_others(there, port, place), place.rendezvous
    if there.startswith("127.") and host not in (there, "localhost") and place.nodes > 1:
        outward = _address_towards(_ELSEWHERE) or "ADDRESS"
        raise RunError(
            f"{host} is {there} on this machine, where other machines do not reach it",
            try_=f"--rendezvous {written(outward, port)} on all nodes",
        )
    return _on_the_first_machine(there, place), written(there, port)


def _towards_others(there: str, port: int, place: Place) -> str:
    """The address of a node that is not on the machine of the rendezvous."""
    own = _address_towards(there)
    if own is None:
        raise RunError(
            f"no route leads from this machine to {there}, where {place.of} has the nodes meet",
            try_=f"ip route get {there}",
        )
    if place.node == 0:
        raise RunError(
            f"{place.rendezvous} is not on this machine, which is node 0: its address is {own}",
            try_=f"--rendezvous {written(own, port)}, or another --node-rank",
        )
    return own


def _on_the_first_machine(there: str, place: Place) -> str:
    """The address of a node on the machine of the rendezvous: of others than node 0 only where all are on one."""
    if place.node == 0:
        return there
    if there.startswith("127."):
        return f"127.0.{(place.node + 1) // 256}.{(place.node + 1) % 256}"
    raise RunError(
        f"{place.rendezvous} is on this machine, which is node {place.node}: node 0 is where the nodes meet",
        try_="--node-rank 0 here; or --rendezvous 127.0.0.1:PORT if all nodes are on one machine",
    )


def written(host: str, port: int) -> str:
    """HOST:PORT, with the brackets of an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _resolved(
    host: str, port: int, *, say: Callable[[str], None], patience_s: float, wait: Callable[[float], None]
) -> str:
    """The address of a name, IPv4 if it has one."""
    waited = 0.0
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            if waited >= patience_s or isinstance(error, UnicodeError):
                why = f"{host} is not the name of a machine that is known here"
                raise RunError(why, try_="--rendezvous with its address") from None
            if not waited:
                say(f"waiting until {host} is known here, for {patience_s:.0f} s at most")
            wait(_AGAIN_S)
            waited += _AGAIN_S
        else:
            return str(min(found, key=lambda each: each[0] != socket.AF_INET)[4][0])


def _address_towards(there: str) -> str | None:
    """The address of this machine that packets to another carry; None if no route leads there. Nothing is sent."""
    with socket.socket(_family(there), socket.SOCK_DGRAM) as own:
        try:
            own.connect((there, 9))
        except OSError:
            return None
        return str(own.getsockname()[0])


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
