"""`qdist gather`: write a run's adapter from a checkpoint."""

import click

from qdist.host.modules import run_module
from qdist.host.rundir import RunDir
from qdist.host.targets import require_checkpoint


@click.command()
@click.argument("run")
@click.option("--checkpoint", default="last", show_default=True, help="last, best, or a step.")
@click.pass_context
def gather(context: click.Context, run: str, checkpoint: str) -> None:
    """Write RUN/adapter, a plain PEFT adapter, from a checkpoint; refuse one that is empty, NaN or unmoved."""
    folder = RunDir(run)
    folder.plan()
    require_checkpoint(folder)
    context.exit(run_module("qdist.runtime.export", ("gather", run, "--checkpoint", checkpoint)))
