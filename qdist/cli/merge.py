"""`qdist merge`: fold adapters into their backbone."""

from typing import Any

import click

from qdist.cli.export import with_runs_checked
from qdist.cli.flags import flags_of
from qdist.core.composed import request_of
from qdist.core.errors import SpecError
from qdist.core.requests import Merge
from qdist.host.run.rundir import RunDir
from qdist.host.tasks import run_task


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@flags_of(Merge)
def merge(**given: Any) -> None:
    """Fold the adapters of RUNs over one base into it, added up; print the held-out losses before and after.

    QA-LoRA: the GPTQ checkpoint stays as it is, and gets an offset for each group: no bit of it is lost. Other methods:
    a 16-bit model that plain transformers loads. Killed, the same command goes on where it was.
    """
    request = with_runs_checked(request_of(Merge, given))
    if (request.onto or request.dtype) and all(RunDir(run).plan().adapter.merges_exactly for run in request.runs):
        raise SpecError(
            "--onto and --dtype are of 16-bit models; QA-LoRA is merged into its GPTQ checkpoint as it is",
            try_="leave them out, or qdist export --to 16bit",
        )
    run_task(request)
