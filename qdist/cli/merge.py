"""`qdist merge`: fold a run's adapter into its backbone, as a 16-bit model."""

from pathlib import Path

import click

from qdist.core.errors import RunError
from qdist.host.modules import run_module
from qdist.host.rundir import RunDir


@click.command()
@click.argument("run")
@click.option("--out", required=True, help="Folder to write; must not exist.")
@click.option("--onto", type=click.Choice(["dequantized", "original"]), default="dequantized", show_default=True,
              help="The backbone that the adapter was trained on, or the weights before quantization.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.pass_context
def merge(context: click.Context, run: str, out: str, onto: str, dtype: str) -> None:
    """Write a 16-bit model that plain transformers loads; print the held-out loss of adapter and merged model."""
    folder = RunDir(run)
    folder.plan()
    if not folder.adapter.is_dir():
        raise RunError(f"{run} has no adapter yet", try_=f"qdist gather {run}")
    if Path(out).exists():
        raise RunError(f"{out} exists", try_="another --out")
    context.exit(run_module("qdist.runtime.merge", (run, out, "--onto", onto, "--dtype", dtype)))
