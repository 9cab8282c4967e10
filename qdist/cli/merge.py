"""`qdist merge`: fold adapters into their backbone, as a 16-bit model."""

from typing import Any

import click

from qdist.cli.export import checked_flags, merge_options
from qdist.host.modules import run_module


@click.command()
@merge_options
@click.pass_context
def merge(context: click.Context, /, **given: Any) -> None:
    """Write a 16-bit model that plain transformers loads; print the held-out loss of adapter and merged model.

    Of several RUNs over one base the updates are added up. Killed, the same command goes on where it was.
    """
    context.exit(run_module("qdist.runtime.merge", checked_flags(**given)))
