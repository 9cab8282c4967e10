"""`qdist convert`: another project's packed checkpoint as a GPTQ folder."""

from pathlib import Path

import click

from qdist.core.errors import ModelError
from qdist.core.text import argument
from qdist.host.files import folder_to_write
from qdist.host.launch.tasks import run_module

ORIGINS = ("sparsebit",)


@click.command()
@click.argument("source", metavar="IN")
@click.option("--from", "origin", type=click.Choice(ORIGINS), required=True,
              help="Whose format IN has: sparsebit is that of alpaca-qlora, 2 to 4 bits.")  # fmt: skip
@click.option("--out", required=True, help="Folder to write; must be empty or absent.")
@click.option("--config", help="Folder with the model's config.json and tokenizer; by default the first Llama's 7B to "
              "65B are told by their shapes.")  # fmt: skip
@click.option("--drop-bias", is_flag=True, help="Leave biases out, as alpaca-qlora's own training did.")
@click.pass_context
def convert(context: click.Context, source: str, origin: str, out: str, config: str | None, drop_bias: bool) -> None:
    """Write the packed checkpoint IN as a GPTQ folder under transformers' names.

    The packed weights stay as they are, bit for bit; scales become float16. Nothing in IN is executed.
    """
    if not Path(source).is_file():
        raise ModelError(f"no file {source}", try_="the path of a .pt, .pth, .pth.tar or .bin file")
    out = folder_to_write(out)
    if config is not None and not Path(config, "config.json").is_file():
        raise ModelError(
            f"no {Path(config, 'config.json')}", try_="a folder with the model's config.json and tokenizer"
        )
    flags = ["--from", origin, *(["--config", argument(config)] if config else [])] + ["--drop-bias"] * drop_bias
    context.exit(run_module("qdist.runtime.quantize.sparsebit.convert", (argument(source), argument(out), *flags)))
