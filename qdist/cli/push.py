"""`qdist push`: upload a run's adapter or merged model to the hub."""

from typing import Any

import click

from qdist.cli.flags import flags_of
from qdist.core.composed import request_of
from qdist.core.requests import Push
from qdist.host.hub.push import check_name, files_to_push, folder_of, require_login
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import step_note
from qdist.host.tasks import run_task
from qdist.host.terminal import say


@click.command()
@click.argument("run")
@click.argument("repo", metavar="OWNER/NAME")
@flags_of(Push)
def push(**given: Any) -> None:
    """Upload the adapter of RUN, or a folder that qdist merge wrote, as the model OWNER/NAME of the hub.

    Weights, configurations, tokenizer and model card go up, in one commit; nothing else does. The token is that of
    HF_TOKEN or `hf auth login`.
    """
    request = request_of(Push, given)
    check_name(request.repo)
    files_to_push(folder_of(request.run, request.what))
    require_login()
    run = RunDir(request.run)
    if request.what == "adapter" and run.exists() and (note := step_note(run)):
        say(f"note     {run.path}: {note}", err=True)
    run_task(request)
