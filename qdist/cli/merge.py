"""`qdist merge`: fold adapters into their backbone."""

from typing import Any

import click

from qdist.cli.export import checked_flags, merge_options
from qdist.cli.kept import run_kept
from qdist.core.errors import SpecError
from qdist.host.run.rundir import RunDir


@click.command()
@merge_options
@click.pass_context
def merge(context: click.Context, /, **given: Any) -> None:
    """Fold the adapters of RUNs over one base into it, added up; print the held-out losses before and after.

    QA-LoRA: the GPTQ checkpoint stays as it is, and gets an offset for each group: no bit of it is lost. Other methods:
    a 16-bit model that plain transformers loads. Killed, the same command goes on where it was.
    """
    flags = checked_flags(given, to="16bit")
    exact = all(RunDir(run).plan().pool > 1 for run in given["runs"])
    if exact and (given["onto"] or given["dtype"]):
        raise SpecError(
            "--onto and --dtype are of 16-bit models; QA-LoRA is merged into its GPTQ checkpoint as it is",
            try_="leave them out, or qdist export --to 16bit",
        )
    context.exit(run_kept("qdist.runtime.exports.merge", flags))
