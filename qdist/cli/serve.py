"""`qdist serve`: answer programs in OpenAI's protocol."""

from importlib.util import find_spec
from typing import Any

import click

from qdist.cli.flags import flags_of
from qdist.core.composed import request_of
from qdist.core.errors import MachineError
from qdist.core.requests import Serve
from qdist.host.launch import vllm
from qdist.host.sources.targets import check_target, targets_to_serve
from qdist.host.tasks import run_task


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="[NAME=]RUN...")
@flags_of(Serve)
def serve(**given: Any) -> None:
    """Serve RUNs over one base, or one model, to programs that speak OpenAI's protocol.

    The base and each adapter are models by name, at http://HOST:PORT/v1. Requests join and leave at any token. Where
    QDIST_API_KEY is set, clients must send it. Ctrl-C and SIGTERM finish what is being answered; a second one ends at
    once.
    """
    request = request_of(Serve, given)
    targets = targets_to_serve(request.runs)
    for path in targets.paths.values():
        check_target(path, max_memory=request.max_memory, trusted=request.trust_remote_code)
    if request.engine == "vllm":
        vllm.serve(request, targets)
        return
    require_server()
    run_task(request)


def require_server() -> None:
    """Raise MachineError where the packages of the extra `serve` are not installed."""
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise MachineError(f"serving needs {' and '.join(missing)}", try_="pip install 'qdist[serve]'")
