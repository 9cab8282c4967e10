"""`qdist chat`: talk to a run's model."""

from typing import Any

import click

from qdist.cli.flags import flags_of
from qdist.core.requests import Chat, request_of
from qdist.host.sources.targets import check_target
from qdist.host.tasks import run_task


@click.command()
@click.argument("run")
@flags_of(Chat)
def chat(**given: Any) -> None:
    """Talk to RUN's adapter, or to any model; answers stream.

    The model goes to the first GPU with room for it; else its layers are spread over the GPUs; else as many as need be
    are offloaded to host memory. A line says where it lies. Ctrl-C ends an answer and keeps the conversation; /help
    lists the commands.
    """
    request = request_of(Chat, given)
    check_target(request.run, max_memory=request.max_memory, trusted=request.trust_remote_code)
    run_task(request)
