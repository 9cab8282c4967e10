"""`qdist launch`: plan a run, write its directory, start the ranks, watch them to the end."""

import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import click

from qdist.cli.flags import FLAGS, SettingsCommand, setting_flags
from qdist.cli.nodes import follow
from qdist.cli.views.plan import plan_lines, preview_lines, shown
from qdist.cli.watch import Watch, ending, how_to_go_on
from qdist.core.errors import SpecError, flag_of
from qdist.core.nodes.places import Place, read_flags
from qdist.core.spec.lookup import typed_settings
from qdist.core.spec.run_spec import nest
from qdist.host.launch import prepare, ranks
from qdist.host.launch.claim import claimed
from qdist.host.launch.planning import job_of
from qdist.host.nodes import launching
from qdist.host.nodes.asked import Asked, asked_of
from qdist.host.nodes.joining import joining
from qdist.host.nodes.place import place_here
from qdist.host.run import rundir
from qdist.host.run.rundir import RunDir, free_name
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
@click.option("--hosts", metavar="FILE", help="Run on the machines that FILE (hosts.toml) names, over ssh.")
@click.option("--nnodes", metavar="MIN:MAX", help="Run on so many machines, on each of which this command is started.")
@click.option("--node-rank", type=int, metavar="R", help="Number of this machine among them, from 0.")
@click.option("--rendezvous", metavar="HOST:PORT", help="Where they meet: an address of machine 0, and a free port.")
def launch(
    recipe: str | None,
    assignments: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    hosts: str | None,
    nnodes: str | None,
    node_rank: int | None,
    rendezvous: str | None,
    **flags: Any,
) -> None:
    """Fine-tune a quantized model: flags over RECIPE (a TOML file) over QLoRA's defaults."""
    given = nest(typed_settings(flags, assignments))
    if hosts is not None:
        _refuse_beside_hosts({"nnodes": nnodes, "node_rank": node_rank, "rendezvous": rendezvous})
        _launch_on_hosts(hosts, recipe, given, resume=resume, dry_run=dry_run)
        return
    place, stale = place_here(read_flags(nnodes, node_rank, rendezvous), os.environ)
    if stale:
        say(stale)
    if place is None:
        _launch_here(recipe, given, resume=resume, dry_run=dry_run)
    else:
        _refuse_dry_run(dry_run)
        _launch_at(place, asked_of(recipe, given, resume=resume))


def _refuse_beside_hosts(flags: Mapping[str, object]) -> None:
    """Raise SpecError for flags with which every machine is started by itself, beside a file that names them all."""
    if typed := [flag_of(name) for name, value in flags.items() if value is not None]:
        raise SpecError(
            f"--hosts starts all machines from here, and {typed[0]} is for starting each by itself",
            try_=f"leave {' and '.join(typed)} out; least = N in the file is the fewest hosts to go on with",
        )


def _launch_on_hosts(file: str, recipe: str | None, given: Mapping[str, Any], *, resume: bool, dry_run: bool) -> None:
    """Run on the hosts of a file, and watch the run to its end."""
    asked = asked_of(recipe, given, resume=resume)
    if not given.get("run"):
        asked = asked._replace(run=free_name(asked.run.parent, asked.run.name))
    party = launching.party_of(file)
    if dry_run:
        _show(launching.previewed(party, asked, say=say))
        return
    with launching.on_hosts(party, asked, say=say) as agents:
        follow(RunDir(asked.run), agents, flags=("--hosts", file))


def _show(preview: prepare.Preview) -> None:
    """What a launch would do, and the script that it would leave."""
    say(shown(preview_lines(preview)))
    if preview.job:
        say("\n" + preview.job.files["launch.sh"])


def _refuse_dry_run(dry_run: bool) -> None:
    if dry_run:
        raise SpecError(
            "--dry-run is of one machine: what several have is known once they are asked",
            try_="qdist plan with --nodes N; or --nnodes 1, to plan this machine",
        )


def _launch_at(place: Place, asked: Asked) -> None:
    """Run this machine's part in a run of several, and watch the run to its end."""
    with joining(asked, place, os.environ, say=say) as agents:
        follow(RunDir(asked.run), agents, tracks=place.node == 0, leaves=True, flags=place.flags)


def _launch_here(recipe: str | None, given: Mapping[str, Any], *, resume: bool, dry_run: bool) -> None:
    """Run on this machine alone, and watch the run to its end."""
    job = job_of(recipe, given, resume=resume, dry_run=dry_run, say=say)
    if isinstance(job, RunDir):
        return
    if isinstance(job, prepare.Preview):
        _show(job)
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
