"""`qdist generate`: answer a file of prompts."""

import click

from qdist.host.modules import run_module


@click.command()
@click.argument("run")
@click.option("--prompts", required=True, help="Text file with a prompt a line, or JSONL with prompt or messages.")
@click.option("--out", required=True, help="JSONL file to write.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts at a time.")
@click.pass_context
def generate(context: click.Context, run: str, prompts: str, out: str, max_new_tokens: int, batch: int) -> None:
    """Answer prompts with RUN's adapter, or with any model."""
    options = ("--prompts", prompts, "--out", out, "--max-new-tokens", str(max_new_tokens), "--batch", str(batch))
    context.exit(run_module("qdist.runtime.generate", ("file", run, *options)))
