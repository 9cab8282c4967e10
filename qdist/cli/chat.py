"""`qdist chat`: talk to a run's model."""

from typing import Any

import click

from qdist.cli.flags import flags_of
from qdist.core.composed import sampled_request_of, usual_sampling
from qdist.core.requests import Chat
from qdist.core.sampling import Sampling
from qdist.host.sources.targets import check_adapter, check_target
from qdist.host.tasks import run_task


@click.command()
@click.argument("run")
@flags_of(Chat)
@flags_of(Sampling, usual_sampling(Chat))
def chat(**given: Any) -> None:
    """Talk to RUN's adapter, or to any model; answers stream.

    The model goes to the first GPU with room for it; else its layers are spread over the GPUs; else as many as need be
    are offloaded to host memory. A line says where it lies. Ctrl-C ends an answer and keeps the conversation; /help
    lists the commands, for sampling, the system message, saving and more. With --compare base and adapter answer the
    same questions beside each other.
    """
    request = sampled_request_of(Chat, given)
    check_target(request.run, max_memory=request.max_memory, trusted=request.trust_remote_code)
    if request.compare:
        check_adapter(request.run)
    run_task(request)
