"""`qdist chat`: talk to a run's model."""

import signal

import click

from qdist.core.text import argument
from qdist.host.launch.tasks import run_module
from qdist.host.sources.targets import check_target, memory_cap


@click.command()
@click.argument("run")
@click.option("--system", default="", help="System message.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--max-memory", help="What to put on each GPU at most, such as 20GiB.")
@click.pass_context
def chat(context: click.Context, run: str, system: str, max_new_tokens: int, max_memory: str | None) -> None:
    """Talk to RUN's adapter, or to any model; answers stream.

    The model goes to the first GPU with room for it; else its layers are spread over the GPUs; else as many as need be
    wait in host memory. A line says where it lies. Ctrl-C ends an answer and keeps the conversation; /help tells the
    commands.
    """
    options = [f"--system={system}", "--max-new-tokens", str(max_new_tokens), *memory_cap(max_memory)]
    check_target(run)
    # Ctrl-C is the child's: it ends an answer there, and leaves at the prompt.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = run_module("qdist.runtime.infer.generate", ("chat", argument(run), *options), asks=True)
    finally:
        signal.signal(signal.SIGINT, before)
    context.exit(code)
