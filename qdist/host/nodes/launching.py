"""Starts a run on the hosts of a file: asks all of them, sees that they agree, and starts an agent on each."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from qdist.core.errors import QdistError, RunError, SpecError
from qdist.core.machine.cluster import joined
from qdist.core.nodes.agreement import require_agreement, require_one_run
from qdist.core.nodes.facts import NodeFacts
from qdist.core.nodes.hosts import EXAMPLE, Host, Hosts, read_hosts
from qdist.core.nodes.job import NodeJob
from qdist.core.spec.run_spec import resolve
from qdist.core.text import command, counted, first_few, format_bytes
from qdist.host.files import locked
from qdist.host.launch import prepare
from qdist.host.nodes import facts
from qdist.host.nodes.addresses import addresses_of, own_place
from qdist.host.nodes.agents import AGENT, Agent, Agents, Here, Place
from qdist.host.nodes.asked import Asked
from qdist.host.nodes.descriptors import allow_descriptors
from qdist.host.nodes.network import measured_network
from qdist.host.nodes.ssh import Ssh, ask, read_answer
from qdist.host.nodes.token import new_token
from qdist.host.opening import read_toml
from qdist.host.run.rundir import LOCK, RunDir
from qdist.host.run.state import sign

_AT_ONCE = 64
"""Hosts that are asked at the same time: each takes a process and its pipes."""
Heard = tuple[NodeFacts, tuple[float, float]]
"""What a host says of itself, and when it was asked and had answered."""


class Party(NamedTuple):
    """The hosts of a run, in order, and this machine's place among them."""

    hosts: Hosts
    addresses: tuple[str, ...]
    own: int


def party_of(file: str) -> Party:
    """The hosts that a file names. Raises SpecError or RunError if it is wrong, or this machine is none of them."""
    hosts = read_hosts(read_toml(Path(file), SpecError, try_=f"a file with {EXAMPLE}"), where=file)
    addresses = addresses_of(hosts.host, where=file)
    return Party(hosts, addresses, own_place(hosts.host, addresses, where=file))


@contextmanager
def on_hosts(party: Party, asked: Asked, *, say: Callable[[str], None], agent: str = AGENT) -> Iterator[Agents]:
    """The agents of a run on all hosts, which agree and are not started yet. The run directory here is held meanwhile.

    say: called with a line for the user. agent: the module that they run.
    Raises QdistError naming the host that cannot take part.
    """
    allow_descriptors()
    jobs = jobs_of(party, asked, new_token())
    for found in agreeing(party, jobs, asked):
        say(_line(found))
    places: list[Place] = [Ssh(host, module=agent) for host in party.hosts.host]
    places[party.own] = Here(jobs[party.own].name, module=agent)
    run = RunDir(asked.run)
    with _held(run):
        yield Agents(run, [Agent(job, place) for job, place in zip(jobs, places, strict=True)])


def previewed(party: Party, asked: Asked, *, say: Callable[[str], None]) -> prepare.Preview:
    """What a launch would do, by what all hosts say of themselves. Raises as `on_hosts` does."""
    found = agreeing(party, jobs_of(party, asked, new_token()), asked)
    for each in found:
        say(_line(each))
    here = joined(
        [each.cluster for each in found], [each.name for each in found], [each.gpus for each in found],
        measured_network(party.addresses),
    )  # fmt: skip
    if asked.resume:
        return prepare.preview_resume(RunDir(asked.run), asked.settings, here)
    return prepare.preview(resolve(asked.settings, {"run": str(asked.run)}), here)


def agreeing(party: Party, jobs: Sequence[NodeJob], asked: Asked) -> list[NodeFacts]:
    """What the hosts say of themselves. Raises QdistError, naming a host, where they do not agree."""
    heard = heard_from(party, jobs)
    found = [each for each, _ in heard]
    require_ready(found, [between for _, between in heard], asked)
    return found


def jobs_of(party: Party, asked: Asked, token: str) -> tuple[NodeJob, ...]:
    """What the agent of each host is started with."""
    hosts = party.hosts
    endpoints = tuple(
        f"[{address}]:{hosts.port}" if ":" in address else f"{address}:{hosts.port}" for address in party.addresses
    )
    return tuple(
        NodeJob(
            run=str(asked.run), node=node, name=host.name, address=address, endpoints=endpoints, least=hosts.least,
            most=len(hosts.host), token=token, settings=asked.settings, resume=asked.resume,
            gpus=host.gpus or asked.gpus, rejoin_s=hosts.rejoin_seconds, attached=node == party.own,
        )
        for node, (host, address) in enumerate(zip(hosts.host, party.addresses, strict=True))
    )  # fmt: skip


def heard_from(party: Party, jobs: Sequence[NodeJob]) -> list[Heard]:
    """What all hosts say of themselves, asked side by side.

    Raises the error of the first one that cannot be asked, with the names of others.
    """

    def ask_one(node: int) -> Heard | QdistError:
        try:
            return _heard(party.hosts.host[node], jobs[node], here=node == party.own)
        except QdistError as error:
            return error

    with ThreadPoolExecutor(min(len(jobs), _AT_ONCE)) as pool:
        answers = list(pool.map(ask_one, range(len(jobs))))
    failed = [(job.name, answer) for job, answer in zip(jobs, answers, strict=True) if isinstance(answer, QdistError)]
    if failed:
        (_, error), *others = failed
        if others:
            error.message += f" (and {first_few([name for name, _ in others])} cannot take part either)"
        raise error
    return [answer for answer in answers if not isinstance(answer, QdistError)]


def _heard(host: Host, job: NodeJob, *, here: bool) -> Heard:
    asked = time.time()
    if here:
        return facts.facts_here(job), (asked, time.time())
    printed = ask(host, facts.__name__, msgspec.structs.replace(job, token=""))
    return read_answer(host, printed, NodeFacts), (asked, time.time())


def require_ready(found: Sequence[NodeFacts], asked: Sequence[tuple[float, float]], wanted: Asked) -> None:
    """Raise RunError, naming a host, where the hosts do not agree or one is at work already."""
    run = str(wanted.run)
    busy = next((one for one in found if one.busy), None)
    if busy:
        raise RunError(
            f"an agent of an earlier launch is at work in {run} on {busy.name}",
            try_=f"on {busy.name}: {command('stop', run)}",
        )
    require_one_run([one for one in found if one.run_id], going=False, resume=wanted.resume, run=run)
    require_agreement(found, asked=asked)


def _line(found: NodeFacts) -> str:
    """'host     10.0.0.1: 2 x NVIDIA A100, 812 GiB free', for the user."""
    cards = found.cluster.gpus[: found.gpus]
    has = f"{found.gpus} x {cards[0].name}" if cards else counted(found.gpus, "CPU rank")
    return f"host     {found.name}: {has}, {format_bytes(found.free_bytes)} free for the run"


@contextmanager
def _held(run: RunDir) -> Iterator[None]:
    """Hold a run directory, so that no other launch of this machine starts anything in it."""
    run.path.mkdir(parents=True, exist_ok=True)
    with locked(run.path / LOCK, busy=f"{run.path} is being trained by another process") as lock:
        sign(lock)
        yield
