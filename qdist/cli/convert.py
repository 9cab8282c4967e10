"""`qdist convert`: another project's packed checkpoint as a GPTQ folder."""

from pathlib import Path
from typing import Any

import click
import msgspec

from qdist.cli.flags import flags_of
from qdist.core.composed import request_of
from qdist.core.errors import ModelError
from qdist.core.requests import Convert
from qdist.host.files import folder_to_write
from qdist.host.tasks import run_task


@click.command()
@click.argument("source", metavar="IN")
@flags_of(Convert)
def convert(**given: Any) -> None:
    """Write the packed checkpoint IN as a GPTQ folder under transformers' names.

    The packed weights stay as they are, bit for bit; scales become float16. Nothing in IN is executed.
    """
    request = request_of(Convert, given)
    if not Path(request.source).is_file():
        raise ModelError(f"no file {request.source}", try_="the path of a .pt, .pth, .pth.tar or .bin file")
    request = msgspec.structs.replace(request, out=folder_to_write(request.out))
    if request.config is not None and not Path(request.config, "config.json").is_file():
        raise ModelError(
            f"no {Path(request.config, 'config.json')}", try_="a folder with the model's config.json and tokenizer"
        )
    run_task(request)
