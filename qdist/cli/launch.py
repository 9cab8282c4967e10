"""`qdist launch`: plan a run, write its directory, start the ranks, watch them to the end."""

import shutil
import sys
from pathlib import Path
from typing import Any

import click

from qdist.cli.flags import FLAGS, SettingsCommand, setting_flags, typed_settings
from qdist.cli.views.plan import plan_lines, preview_lines, shown
from qdist.cli.watch import Watch, ending
from qdist.core.data.demo import NAME as DEMO
from qdist.core.errors import RunError, SpecError
from qdist.core.spec.spec import nest, resolve
from qdist.core.text import resuming
from qdist.host import templates
from qdist.host.launch import local, prepare
from qdist.host.launch.claim import claimed, tidy
from qdist.host.launch.refusals import await_ranks, refuse_running
from qdist.host.launch.trackers import send_rest
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
    if resume:
        job = _resumed(recipe, given, dry_run=dry_run)
    else:
        recipe = recipe or (DEMO if given.get("data") == DEMO else None)
        spec = resolve(*([templates.read_recipe(recipe)] if recipe else []), given)
        job = prepare.preview(spec) if dry_run else prepare.prepare(spec)
        if recipe:
            say(f"recipe   {recipe}" + (" (chosen because of --data demo)" if recipe == DEMO else ""))
    if job is None:
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
                local.start(own, show=watch.show, say=watch.say, recall=watch.recall)
        except KeyboardInterrupt:
            _say_stopped(run)
            raise SystemExit(130) from None
    ending(run, job.plan)


def _resumed(recipe: str | None, given: dict[str, Any], *, dry_run: bool) -> prepare.Job | prepare.Preview | None:
    """The rest of a run, or what it would be; None when there is none."""
    path = given.pop("run", None)
    if recipe or not path:
        raise SpecError(
            "--resume goes with --run DIR alone: the run knows its recipe", try_="qdist launch --resume --run runs/NAME"
        )
    run = RunDir(Path(path))
    result = run.result()
    if result is not None and given:
        raise RunError(
            f"{run.path} is finished after {result.get('steps', 'all')} steps and cannot be changed", try_="a new run"
        )
    if result is not None:
        tidy(run)
        send_rest(run, say=say)
        say(f"{run.path} is finished: {result.get('steps', 'all')} steps, adapter in {run.adapter}")
        return None
    await_ranks(run, say=say)
    refuse_running(run)
    job = prepare.preview_resume(run, given) if dry_run else prepare.prepare_resume(run, given)
    steps = run.checkpoint_steps()
    say(f"resuming {run.path} " + (f"from step {steps[-1]}" if steps else "from the start: it has no checkpoint"))
    return job


def _say_stopped(run: RunDir) -> None:
    steps = run.checkpoint_steps()
    kept = f"the checkpoint of step {steps[-1]} is whole" if steps else "there is no checkpoint yet"
    say(f"stopped; {kept}\n  go on: {resuming(run.path)}", err=True)
