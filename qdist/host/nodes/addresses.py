"""Which addresses do the hosts of a file have, and which of them is this machine?"""

import ipaddress
import socket
import subprocess
from collections.abc import Sequence

from qdist.core.errors import RunError
from qdist.core.nodes.hosts import Host
from qdist.core.text import first_few


def addresses_of(hosts: Sequence[Host], *, where: str) -> tuple[str, ...]:
    """The address of each host: as the file says, or what its name means here or to ssh.

    Raises RunError for a name that means nothing, for two hosts at one address, and for one that only this machine
    reaches.
    """
    found = tuple(_address_of(host, where) for host in hosts)
    for host, address in zip(hosts, found, strict=True):
        first = hosts[found.index(address)]
        if first is not host:
            raise RunError(f"{first.name} and {host.name} in {where} are one machine: {address}", try_="each host once")
    loops = [host for host, address in zip(hosts, found, strict=True) if ipaddress.ip_address(address).is_loopback]
    if loops and len(loops) < len(hosts):
        address = found[hosts.index(loops[0])]
        raise RunError(
            f"{loops[0].name} means {address} here, where no other host reaches it",
            try_=f'address = "ITS ADDRESS" below the name of {loops[0].name} in {where}',
        )
    return found


def _address_of(host: Host, where: str) -> str:
    named = host.address or host.name
    known = _look_up(named) or (None if host.address else _look_up(_name_for_ssh(host)))
    if known is None:
        raise RunError(
            f"{named} in {where} is no machine that is known here",
            try_=f'address = "10.0.0.1" below the name of {host.name}',
        )
    return known


def _look_up(name: str) -> str | None:
    """An address that a name means; IPv4 where it has one. None for an unknown name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return str(socket.getaddrinfo(name, None, family, socket.SOCK_STREAM)[0][4][0])
        except (OSError, UnicodeError):
            continue
    return None


def _name_for_ssh(host: Host) -> str:
    """What ssh takes a name for: it may be an alias of its configuration. The name itself if that cannot be asked."""
    try:
        said = subprocess.run(["ssh", "-G", "--", host.name], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return host.name
    named = [line.partition(" ")[2] for line in said.stdout.splitlines() if line.startswith("hostname ")]
    return named[0] if named else host.name


def own_place(hosts: Sequence[Host], addresses: Sequence[str], *, where: str) -> int:
    """Which of the hosts this machine is: the first whose address is its own. Raises RunError if it is none."""
    for place, address in enumerate(addresses):
        if is_own(address):
            return place
    names = first_few([host.name for host in hosts])
    raise RunError(
        f"this machine, {socket.gethostname()}, is none of the hosts in {where}: {names}",
        try_=f"the same command on {hosts[0].name}, or a [[host]] for this machine",
    )


def is_own(address: str) -> bool:
    """Whether an address is one of this machine's: a socket can be bound to it."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
