"""Measures the network between the hosts of a file, pair by pair, and has every host keep the figures."""

import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, TypeVar

import msgspec

from qdist.core.errors import RunError
from qdist.core.nodes.hosts import Host
from qdist.core.nodes.pairs import Pair, rounds_of
from qdist.host.nodes import speed
from qdist.host.nodes.descriptors import allow_descriptors
from qdist.host.nodes.launching import Party
from qdist.host.nodes.network import keep_pairs
from qdist.host.nodes.speed import TOKEN_BYTES, Part, Waits
from qdist.host.nodes.ssh import ask, command_of, explain, read_answer

T = TypeVar("T")
_LEAST_S = 30.0
"""Seconds that a measurement may take beside the time for which bytes are sent."""
_ENDING_S = 5.0


def measured_pairs(party: Party, *, seconds: float = speed.SECONDS) -> tuple[Pair, ...]:
    """What the hosts measure between each other; kept on each of them.

    seconds: for which bytes are sent one way. Raises QdistError naming a host that cannot be asked or reached.
    """
    if len(party.addresses) < 2:
        raise RunError("there is no network between the hosts: there is one", try_="two hosts or more in the file")
    allow_descriptors()
    token = secrets.token_hex(TOKEN_BYTES // 2)
    with ExitStack() as stack, ThreadPoolExecutor(len(party.addresses)) as pool:
        waiting = [
            stack.enter_context(_waiting(host, Part(address=address, token=token), here=place == party.own))
            for place, (host, address) in enumerate(zip(party.hosts.host, party.addresses, strict=True))
        ]
        ports = [*pool.map(lambda each: each.port(), waiting)]

        def measure(pair: tuple[int, int]) -> Pair:
            one, other = pair
            peer = (party.addresses[other], ports[other])
            part = Part(address=party.addresses[one], token=token, peer=peer, seconds=seconds)
            return _asked(party, one, part, Pair)

        found = tuple(pair for each in rounds_of(len(ports)) for pair in pool.map(measure, each))
        _keep(party, found, pool)
    return found


def _keep(party: Party, found: Sequence[Pair], pool: ThreadPoolExecutor) -> None:
    """Have all hosts keep the figures: any of them may be the one that plans."""
    part = Part(keep=tuple(found), source=time.strftime("measured %Y-%m-%d"))
    keep_pairs(part.keep, part.source)
    others = [place for place in range(len(party.addresses)) if place != party.own]
    list(pool.map(lambda place: _asked(party, place, part, str), others))


def _asked(party: Party, place: int, part: Part, kind: type[T]) -> T:
    host = party.hosts.host[place]
    limit_s = _LEAST_S + 4 * part.seconds
    printed = ask(host, speed.__name__, part, here=place == party.own, timeout_s=limit_s)
    return read_answer(host, printed, kind)


class _Waiter:
    """A host that waits for the others' connections."""

    def __init__(self, host: Host, process: "subprocess.Popen[bytes]", errors: IO[bytes]) -> None:
        self._host, self.process, self._errors = host, process, errors

    def port(self) -> int:
        """The port that it waits on. Raises QdistError if the host cannot be asked."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(b"{"):
                return read_answer(self._host, line, Waits).port
        self._errors.seek(0)
        raise explain(self._host, self.process.wait(), self._errors.read().decode(errors="replace").splitlines())


@contextmanager
def _waiting(host: Host, part: Part, *, here: bool) -> Iterator[_Waiter]:
    """A host that waits as long as this context."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command_of(host, speed.__name__, here=here), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        assert process.stdin is not None
        with process:
            try:
                with suppress(BrokenPipeError):  # it has ended: `port` tells why
                    process.stdin.write(msgspec.json.encode(part) + b"\n")
                    process.stdin.flush()
                yield _Waiter(host, process, errors)
            finally:
                _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a host's waiting: the end of its standard input ends it there as well."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
