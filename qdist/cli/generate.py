"""`qdist generate`: answer a file of prompts."""

from pathlib import Path

import click

from qdist.cli.kept import run_kept
from qdist.core.text import argument
from qdist.host.data.records import read_prompts
from qdist.host.files import stream_to_write
from qdist.host.sources.targets import check_target, memory_cap


@click.command()
@click.argument("run")
@click.option("--prompts", required=True, help="Text file with a prompt a line, or data with prompt or messages.")
@click.option("--out", required=True, help="JSONL file to write; must not be there yet.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts at a time.")
@click.option("--max-memory", help="What to put on each GPU at most, such as 20GiB.")
@click.pass_context
def generate(
    context: click.Context,
    run: str,
    prompts: str,
    out: str,
    max_new_tokens: int,
    batch: int,
    max_memory: str | None,
) -> None:
    """Answer prompts with RUN's adapter, or with any model.

    The model goes to the first GPU with room for it and the answers; else its layers are spread over the GPUs; else as
    many as need be wait in host memory. A line says where it lies. Answers are kept as they come: killed, the same
    command goes on where it was.
    """
    out = stream_to_write(out)
    read_prompts(Path(prompts))
    options = ["--prompts", argument(prompts), "--out", argument(out)]
    options += ["--max-new-tokens", str(max_new_tokens), "--batch", str(batch), *memory_cap(max_memory)]
    check_target(run)
    context.exit(run_kept("qdist.runtime.infer.generate", ("file", argument(run), *options)))
