"""`qdist stop`: ask a run's ranks to save and end, from any terminal, and wait until they have."""

import time

import click

from qdist.core.errors import RunError
from qdist.core.text import command, first_few
from qdist.host.run.nodes import how_to_resume, nodes_now
from qdist.host.run.presence import agent_is_here
from qdist.host.run.rundir import STOP, RunDir
from qdist.host.run.state import state_of
from qdist.host.terminal import say


@click.command()
@click.argument("run")
def stop(run: str) -> None:
    """End RUN after the step that it is at, with a checkpoint from which it can go on.

    A run of several machines is ended on all of them, from any that takes part.

    Ctrl-C here ends the waiting, not the run's stopping.
    """
    folder = RunDir(run)
    folder.plan()
    state, nodes = state_of(folder), nodes_now(folder)
    names = first_few([member.name for member in nodes.members]) if nodes else ""
    if state == "killed" and nodes and names and not nodes.ended:
        raise RunError(
            f"{run} is not running here; its nodes were {names}", try_=f"{command('stop', run)} on one of them"
        )
    if state != "running":
        raise RunError(f"{run} is not running: it is {state}", try_=command("runs", folder.path.parent))
    try:
        (folder.path / STOP).touch()
    except OSError as error:
        raise RunError(f"{run} cannot be asked to stop: {error.strerror}", try_="the user who launched it") from error
    where = f" on {names}" if names and agent_is_here(folder) else ""
    say(f"{run} saves a checkpoint after this step and ends{where}")
    while state_of(folder) == "running":
        time.sleep(0.2)
    if folder.result() is not None:
        say("it had come to its end before")
        return
    say(f"stopped; {folder.last_saved()}")
    say(f"  go on: {how_to_resume(folder, nodes)}")
