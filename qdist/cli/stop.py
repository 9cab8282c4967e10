"""`qdist stop`: ask a run's ranks to save and end, from any terminal, and wait until they have."""

import time

import click

from qdist.core.errors import RunError
from qdist.core.text import command, resuming
from qdist.host.run.rundir import STOP, RunDir
from qdist.host.run.state import state_of
from qdist.host.terminal import say


@click.command()
@click.argument("run")
def stop(run: str) -> None:
    """End RUN after the step that it is at, with a checkpoint from which it can go on.

    Ctrl-C here ends the waiting, not the run's stopping.
    """
    folder = RunDir(run)
    folder.plan()
    state = state_of(folder)
    if state != "running":
        raise RunError(f"{run} is not running: it is {state}", try_=command("runs", folder.path.parent))
    try:
        (folder.path / STOP).touch()
    except OSError as error:
        raise RunError(f"{run} cannot be asked to stop: {error.strerror}", try_="the user who launched it") from error
    say(f"{run} saves a checkpoint after this step and ends")
    while state_of(folder) == "running":
        time.sleep(0.2)
    if folder.result() is not None:
        say("it had come to its end before")
        return
    say(f"stopped; {folder.last_saved()}")
    say(f"  go on: {resuming(folder.path)}")
