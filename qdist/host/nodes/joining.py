"""Starts this machine's node of a run whose other nodes are started where they are: by hand, srun, torchrun, mpirun."""

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from qdist.core.nodes.job import NodeJob
from qdist.core.nodes.places import Place
from qdist.host.nodes.agents import Agent, Agents, Here
from qdist.host.nodes.asked import Asked
from qdist.host.nodes.job_token import token_of
from qdist.host.nodes.place import meeting
from qdist.host.run.rundir import RunDir


def node_job(asked: Asked, place: Place, token: str, *, say: Callable[[str], None]) -> NodeJob:
    """What this node's agent is started with. Raises RunError as `meeting` does."""
    address, rendezvous = meeting(place, say=say)
    return NodeJob(
        run=str(asked.run),
        node=place.node,
        name=f"{socket.gethostname()}-{place.node}" if address.startswith("127.") else socket.gethostname(),
        address=address,
        endpoints=(rendezvous,),
        least=place.least,
        most=place.nodes,
        token=token,
        settings=asked.settings,
        resume=asked.resume,
        gpus=asked.gpus,
    )


@contextmanager
def joining(asked: Asked, place: Place, environ: Mapping[str, str], *, say: Callable[[str], None]) -> Iterator[Agents]:
    """This machine's agent, which is not started yet. The run's token is there as long as this context.

    say: called with a line for the user.
    Raises SpecError for a run without a token, RunError where the nodes cannot meet.
    """
    with token_of(asked.run, place, environ, say=say) as token:
        job = node_job(asked, place, token, say=say)
        say(f"node     {job.name} is node {job.node} of {_range(job)} ({place.of}), {job.address}")
        say(f"meeting  at {job.endpoints[0]}")
        yield Agents(RunDir(asked.run), [Agent(job, Here(job.name))])


def _range(job: NodeJob) -> str:
    return f"{job.most}" if job.least == job.most else f"{job.least} to {job.most}"
