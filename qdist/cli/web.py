"""`qdist web`: talk to a run's model on a page in the browser."""

from typing import Any

import click

from qdist.cli.flags import flags_of
from qdist.cli.serve import require_server
from qdist.core.composed import request_of
from qdist.core.requests import Web
from qdist.host.sources.targets import check_target, targets_to_serve
from qdist.host.tasks import run_task


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="[NAME=]RUN...")
@flags_of(Web)
def web(**given: Any) -> None:
    """Show a page to talk to RUNs over one base, beside that base, or to any model.

    The page is at http://HOST:PORT/, with the first run's curves; programs find OpenAI's protocol at /v1 of the same
    server. Ctrl-C ends it.
    """
    request = request_of(Web, given)
    for path in targets_to_serve(request.runs).paths.values():
        check_target(path, max_memory=request.max_memory, trusted=request.trust_remote_code)
    require_server()
    run_task(request)
