"""`qdist quantize`: pack a model's weights once, as a folder that plain transformers loads too."""

from pathlib import Path

import click

from qdist.core.errors import RunError, SpecError, nearest
from qdist.host.modules import run_module
from qdist.host.sources import locate

METHODS = ("nf4", "fp4", "int8")


@click.command()
@click.argument("model")
@click.option("--method", default="nf4", show_default=True, metavar="|".join(METHODS),
              help="4-bit normal floats, 4-bit floats, or LLM.int8.")  # fmt: skip
@click.option("--double/--no-double", default=None, help="Quantize the scales of 4-bit blocks too.  [default: double]")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default=None,
              help="Of what is not packed, and what is packed from; by default as the model is stored.")  # fmt: skip
@click.option("--out", required=True, help="Folder to write; must be empty or absent.")
@click.pass_context
def quantize(context: click.Context, model: str, method: str, double: bool | None, dtype: str | None, out: str) -> None:
    """Pack the decoder's linear layers of MODEL: an alias, a folder, a GGUF file or a hub id.

    The folder is a complete model for transformers and for `qdist launch --model`. Killed, the same command goes on
    where it was.
    """
    _check(method, double)
    locate(model)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{out} exists", try_="another --out")
    flags = ["--method", method, *(["--single"] if double is False else []), *(["--dtype", dtype] if dtype else [])]
    context.exit(run_module("qdist.runtime.quantize", (model, out, *flags)))


def _check(method: str, double: bool | None) -> None:
    if method.lower() == "gptq":
        raise SpecError("gptq needs calibration data and is not there yet", try_="--method nf4")
    if method not in METHODS:
        raise SpecError(
            f"method cannot be {method!r}: it is one of {', '.join(METHODS)}",
            try_=f"--method {nearest(method, METHODS) or METHODS[0]}",
        )
    if method == "int8" and double is not None:
        raise SpecError("--double and --no-double describe 4-bit blocks; int8 has one scale a row", try_="leave it out")
