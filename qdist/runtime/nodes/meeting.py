"""Where the nodes of a run meet: the store, served by one of them behind its gate, reached by the others by a door."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from qdist.core.errors import RunError
from qdist.core.nodes.facts import NodeFacts
from qdist.core.nodes.job import NodeJob
from qdist.core.text import format_duration
from qdist.host.nodes.door import Door, WrongToken, connect
from qdist.host.nodes.gate import Gate
from qdist.host.nodes.remote import Files
from qdist.host.run.rundir import Ended
from qdist.runtime.nodes.beats import CLOCK, Beats

MOST_SERVERS = 16
"""Nodes, from the first, that may serve the store."""
_ENDED, _SERVER, _FACTS = "ended", "server", "facts"
_SKEW_S = 5.0
"""Seconds that clocks may differ: torch's rendezvous counts nodes as dead by the times that they write."""
_PART_S = 20.0
"""Seconds that who serves the store waits for others to hear of the end."""
_STORE_S = 20.0
"""Seconds that an operation of the store may take."""
_REACH_S = 2.0
_FIRST_S, _NEXT_S = 20.0, 3.0
"""Seconds that a node leaves to each node before it to serve the store: at the start of a run, and after a failure."""
Endpoint = tuple[str, int]
GENERATION = "generation"
"""Key of the store that holds the number of the generation at work."""


def endpoint_of(text: str) -> Endpoint:
    """'host:29400' -> ('host', 29400)."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


class Meeting:
    """A run's store as one node sees it; a context that closes what it opened.

    port: of the store, on loopback, for this node's ranks.
    serves: whether it is this node's.
    files: of the run on the node that serves; None there.
    """

    def __init__(self, job: NodeJob, server: Endpoint | None, *, say: Callable[[str], None]) -> None:
        self._node, self._most = job.node, job.most
        self._gate: Gate | None = None
        self._door: Door | None = None
        self.files: Files | None = None
        self._owned: Any = None
        self.serves = server is None
        if server is None:
            self._owned, self.port = _served_store()
            self._gate = Gate(
                _own_endpoint(job), job.token, store=("127.0.0.1", self.port), folder=Path(job.run), say=say
            )
        else:
            self._door = Door(server, job.token)
            self.port, self.files = self._door.port, Files(server, job.token)
        self.store = self.client()
        self.server_node: int | None = None
        self.server_name = ""
        if self.serves:
            self.store.set(_SERVER, f"{job.node} {job.name}")
        self.beats = Beats(self.client(), job.node, serves=self.serves)
        self.beats.start()
        if not self.serves:
            self._checked(job.name)

    def _checked(self, name: str) -> None:
        try:
            number, _, self.server_name = bytes(self.store.get(_SERVER)).decode().partition(" ")
            self.server_node = int(number)
            _require_same_clock(name, self.store, self.server_name)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def client(self) -> Any:
        """A new connection to the store."""
        import torch.distributed as dist

        return dist.TCPStore("127.0.0.1", self.port, None, False, timedelta(seconds=_STORE_S), wait_for_workers=False)

    def generation(self) -> int:
        """The generation at work in this store; 0 before the first. Raises RuntimeError where the store is gone."""
        return int(self.store.get(GENERATION)) if self.store.check([GENERATION]) else 0

    def is_at_work(self) -> bool:
        """Whether a generation works here; not if the store is gone."""
        with suppress(RuntimeError):
            return self.generation() > 0
        return False

    def begin(self, generation: int, facts: NodeFacts) -> None:
        """Say that a generation is at work, and what its leader is: newcomers compare themselves with it."""
        self.store.set(_FACTS, msgspec.json.encode(facts))
        self.store.set(GENERATION, str(generation))

    def facts(self) -> NodeFacts | None:
        """The leader of the generation at work; None before the first."""
        return msgspec.json.decode(self.store.get(_FACTS), type=NodeFacts) if self.store.check([_FACTS]) else None

    def ended(self) -> Ended | None:
        """How the run has ended, as one of its nodes said. Raises RuntimeError where the store is gone."""
        return msgspec.json.decode(self.store.get(_ENDED), type=Ended) if self.store.check([_ENDED]) else None

    def end(self, ended: Ended) -> None:
        """Tell all nodes that the run has ended, and leave once they know it, if they meet here."""
        with suppress(RuntimeError):
            self.store.compare_set(_ENDED, "", msgspec.json.encode(ended).decode())
            self.store.set(f"gone/{self._node}", "1")
            if self.serves:
                self.beats.watch(self._present())
            until = time.monotonic() + _PART_S
            while self.serves and not self._all_gone() and time.monotonic() < until:
                time.sleep(0.1)

    def _present(self) -> list[int]:
        """Nodes that have ever met here: also who only waits to be let in is told of the end."""
        return [node for node in range(self._most) if self.store.check([f"beat/{node}"])]

    def _all_gone(self) -> bool:
        there = self.beats.watched() - self.beats.silent().keys()
        return all(self.store.check([f"gone/{node}"]) for node in there)

    def cut(self) -> None:
        """End all connections to the store at once, so that nothing waits in one of them."""
        if self._door is not None:
            self._door.close()

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.beats.end()
        self.cut()
        if self.files is not None:
            self.files.close()
        if self._gate is not None:
            self._gate.close()
        self.store = self._owned = None


def meet(
    job: NodeJob, *, before: bool, may_serve: bool, check: Callable[[], None], say: Callable[[str], None]
) -> Meeting:
    """Join the store of the first node that serves one, or serve it here once the nodes before have not for a while.

    before: whether the run worked before. may_serve: whether this node may begin without others.
    check: called between attempts; raises where the run was stopped.
    Raises RunError for a wrong token, or where nobody was met for `rejoin_s`.
    """
    own = own_place(job) if may_serve else None
    began, each = time.monotonic(), _NEXT_S if before else _FIRST_S
    while True:
        if (found := reachable(job, own)) is not None:
            try:
                return Meeting(job, found, say=say)
            except (RuntimeError, OSError) as error:  # it has gone in between
                say(f"{found[0]}:{found[1]} answered and went away: {error}")
        waited = time.monotonic() - began
        if own is not None and waited >= own * each:
            return Meeting(job, None, say=say)
        if waited > job.rejoin_s:
            where = " or ".join(job.endpoints[:3])
            raise RunError(
                f"{job.name} has reached nobody at {where} for {format_duration(waited)}",
                try_=f"look whether that machine runs and lets {job.name} in on this port",
            )
        check()
        time.sleep(0.3)


def reachable(job: NodeJob, own: int | None) -> Endpoint | None:
    """The first of the other nodes that serve a store. Raises RunError where one knows another token."""
    others = [endpoint_of(text) for place, text in enumerate(job.endpoints[:MOST_SERVERS]) if place != own]
    if not others:
        return None
    with ThreadPoolExecutor(len(others)) as pool:
        answers = list(pool.map(lambda endpoint: _answers(endpoint, job.token), others))
    if wrong := next((answer for answer in answers if isinstance(answer, WrongToken)), None):
        raise RunError(f"{job.name} was not let in: {wrong.message}", try_=wrong.try_)
    return next((endpoint for endpoint, answer in zip(others, answers, strict=True) if answer is True), None)


def _answers(endpoint: Endpoint, token: str) -> bool | WrongToken:
    try:
        connect(endpoint, token, _REACH_S).close()
    except WrongToken as error:
        return error
    except RunError:
        return False
    return True


def _require_same_clock(name: str, store: Any, server: str) -> None:
    """Raise RunError where this node's clock is not that of who serves: the rendezvous drops nodes of another time."""
    ahead = time.time() - float(store.get(CLOCK))
    if abs(ahead) > _SKEW_S:
        how = f"{format_duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'}"
        raise RunError(
            f"the clock of {name} is {how} that of {server}", try_=f"timedatectl set-ntp true, on {name} or {server}"
        )


def own_place(job: NodeJob) -> int | None:
    """Place of this node's own endpoint among all; None if it has none."""
    for place, text in enumerate(job.endpoints[:MOST_SERVERS]):
        if job.address in _addresses(endpoint_of(text)[0]):
            return place
    return None


def _own_endpoint(job: NodeJob) -> Endpoint:
    place = own_place(job)
    if place is None:
        raise RunError(f"{job.name} is to serve the rendezvous, and {', '.join(job.endpoints)} is not its address")
    return job.address, endpoint_of(job.endpoints[place])[1]


def _addresses(host: str) -> Sequence[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        return [host]


def _served_store() -> tuple[Any, int]:
    """A store that listens on loopback alone, and its port."""
    import torch.distributed as dist

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(4096)
        port = listening.getsockname()[1]
        # torch closes the descriptor that it is given.
        descriptor = os.dup(listening.fileno())
    store = dist.TCPStore(
        "127.0.0.1", port, None, True, timedelta(seconds=_STORE_S), wait_for_workers=False, master_listen_fd=descriptor
    )
    return store, port
