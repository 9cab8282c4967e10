"""`qdist export`: a run's model for other programs."""

from typing import Any, TypeVar

import click
import msgspec

from qdist.cli.flags import flags_of
from qdist.cli.quantize import check_data
from qdist.core.composed import request_of
from qdist.core.requests import Export, Folding
from qdist.host.files import file_to_write, folder_to_write
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import require_adapter, require_base, step_note
from qdist.host.tasks import run_task
from qdist.host.terminal import say

Of = TypeVar("Of", bound=Folding)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@flags_of(Export)
def export(**given: Any) -> None:
    """Write what RUNs over one base have learnt, added up, in a form that needs no qdist.

    Writing any size of model takes a few GiB of host memory. What is at --out is whole or absent.
    """
    request = request_of(Export, given)
    if request.data is not None:
        check_data(request.data)
    run_task(with_runs_checked(request))


def with_runs_checked(request: Of) -> Of:
    """A request with the place that its --out leads to. Raises RunError for runs and places that cannot be used."""
    target = request.to if isinstance(request, Export) else "16bit"
    for run in map(RunDir, request.runs):
        run.plan()
        if target not in ("lora", "vllm"):  # the others take the weights that the adapters lie over
            require_base(run)
        require_adapter(run)
        if note := step_note(run):
            say(f"note     {run.path}: {note}", err=True)
    out = file_to_write(request.out) if target == "gguf" else folder_to_write(request.out)
    return msgspec.structs.replace(request, out=out)
