"""`qdist gather`: write a run's adapter from a checkpoint."""

from typing import Any

import click
import msgspec

from qdist.cli.flags import flags_of
from qdist.core.composed import request_of
from qdist.core.errors import RunError
from qdist.core.requests import Gather
from qdist.host.files import folder_to_write, obstacle
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import require_checkpoint, step_of
from qdist.host.tasks import run_task


@click.command()
@click.argument("run")
@flags_of(Gather)
def gather(**given: Any) -> None:
    """Write RUN/adapter, a plain PEFT adapter, from a checkpoint; refuse one that is empty, NaN or unmoved."""
    request = request_of(Gather, given)
    run = RunDir(request.run)
    run.plan()
    require_checkpoint(run)
    step_of(run, request.checkpoint)
    if request.out is not None:
        request = msgspec.structs.replace(request, out=folder_to_write(request.out))
    elif why := obstacle(run.path):
        raise RunError(f"{run.path} cannot be written: {why}", try_="--out FOLDER, one that you may write to")
    run_task(request)
