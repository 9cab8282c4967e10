"""`qdist generate`: answer a file of prompts."""

from pathlib import Path
from typing import Any

import click
import msgspec

from qdist.cli.flags import flags_of
from qdist.core.composed import sampled_request_of
from qdist.core.requests import Generate
from qdist.core.sampling import Sampling
from qdist.host.data.records import read_prompts
from qdist.host.files import stream_to_write
from qdist.host.sources.targets import check_gpus, check_target, reading_of_target
from qdist.host.tasks import run_task


@click.command()
@click.argument("run")
@flags_of(Generate)
@flags_of(Sampling)
def generate(**given: Any) -> None:
    """Answer prompts with RUN's adapter, or with any model.

    A copy of the model goes to each GPU with room for it and the answers; if none has, its layers are spread over the
    GPUs; else as many as need be are offloaded to host memory. A line says where it lies. Answers are kept as they
    come: killed, the same command goes on where it was.
    """
    request = sampled_request_of(Generate, given)
    out, reading = stream_to_write(request.out), reading_of_target(request.run)
    request = msgspec.structs.replace(request, out=out, reading=reading)
    read_prompts(Path(request.prompts), reading=reading)
    check_target(request.run, max_memory=request.max_memory, trusted=request.trust_remote_code)
    check_gpus(request.gpus)
    run_task(request)
