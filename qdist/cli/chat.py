"""`qdist chat`: talk to a run's model."""

import click

from qdist.host.modules import run_module


@click.command()
@click.argument("run")
@click.option("--system", default="", help="System message.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.pass_context
def chat(context: click.Context, run: str, system: str, max_new_tokens: int) -> None:
    """Talk to RUN's adapter, or to any model; answers stream."""
    context.exit(
        run_module("qdist.runtime.generate", ("chat", run, "--system", system, "--max-new-tokens", str(max_new_tokens)))
    )
