"""`qdist launch`: plan a run, write its directory, start the ranks, watch them to the end."""

import shutil
import sys
from typing import Any

import click

from qdist.cli.flags import FLAGS, SettingsCommand, setting_flags
from qdist.cli.views.plan import plan_lines, preview_lines, shown
from qdist.cli.watch import Watch, ending, how_to_go_on
from qdist.core.spec.lookup import typed_settings
from qdist.core.spec.run_spec import nest
from qdist.host.launch import prepare, ranks
from qdist.host.launch.claim import claimed
from qdist.host.launch.planning import job_of
from qdist.host.run import rundir
from qdist.host.run.rundir import RunDir
from qdist.host.terminal import say


@click.command(cls=SettingsCommand)
@click.argument("recipe", required=False)
@setting_flags(*FLAGS)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any setting of `qdist settings`, such as lora.alpha=32.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --run from its newest checkpoint.")
@click.option("--dry-run", is_flag=True, help="Plan and print; start nothing.")
def launch(recipe: str | None, assignments: tuple[str, ...], resume: bool, dry_run: bool, **flags: Any) -> None:
    """Fine-tune a quantized model: flags over RECIPE (a TOML file) over QLoRA's defaults."""
    given = nest(typed_settings(flags, assignments))
    job = job_of(recipe, given, resume=resume, dry_run=dry_run, say=say)
    if isinstance(job, RunDir):
        return
    if isinstance(job, prepare.Preview):
        say(shown(preview_lines(job)))
        if job.job:
            say("\n" + job.job.files["launch.sh"])
        return
    say(shown(plan_lines(job.plan, notes=job.notes)))
    with claimed(job) as own:
        run = own.job.run
        rundir.note(run, sys.argv)
        say(f"run      {run.path}")
        try:
            with Watch(job.plan, run, width=shutil.get_terminal_size().columns) as watch:
                ranks.start(own, show=watch.show, say=watch.say, recall=watch.recall)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(how_to_go_on(run)) from None
    ending(run, job.plan)
