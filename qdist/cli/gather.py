"""`qdist gather`: write a run's adapter from a checkpoint."""

import click

from qdist.core.errors import RunError
from qdist.core.text import argument
from qdist.host.files import folder_to_write, obstacle
from qdist.host.launch.tasks import run_module
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import require_checkpoint, step_of


@click.command()
@click.argument("run")
@click.option("--checkpoint", default="last", show_default=True, help="last, best, or a step.")
@click.option("--out", help="A folder to write instead; must not be there yet.  [default: RUN/adapter]")
@click.pass_context
def gather(context: click.Context, run: str, checkpoint: str, out: str | None) -> None:
    """Write RUN/adapter, a plain PEFT adapter, from a checkpoint; refuse one that is empty, NaN or unmoved."""
    folder = RunDir(run)
    folder.plan()
    require_checkpoint(folder)
    step_of(folder, checkpoint)
    if out is not None:
        out = folder_to_write(out)
    elif why := obstacle(folder.path):
        raise RunError(f"{run} cannot be written: {why}", try_="--out FOLDER, one that you may write to")
    elsewhere = () if out is None else ("--out", argument(out))
    context.exit(
        run_module("qdist.runtime.train.result", ("gather", argument(run), "--checkpoint", checkpoint, *elsewhere))
    )
