"""`qdist export`: a run's model for other programs."""

import math
from pathlib import Path
from typing import Any

import click

from qdist.core.errors import RunError, SpecError
from qdist.host.modules import run_module
from qdist.host.rundir import RunDir

TARGETS = ("16bit",)


def merge_options(command: Any) -> Any:
    """What every way out of several runs is told."""
    options = (
        click.argument("runs", nargs=-1, required=True, metavar="RUN..."),
        click.option("--out", required=True, help="Folder to write; must be empty or absent."),
        click.option("--onto", type=click.Choice(["dequantized", "original"]), default="dequantized",
                     show_default=True,
                     help="The backbone that the adapter was trained on, or the weights before quantization."),
        click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", show_default=True),
        click.option("--weights", metavar="W,W,...", help="What each run's update is multiplied by.  [default: 1]"),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.option("--to", type=click.Choice(TARGETS), required=True, help="16bit: merged, for plain transformers.")
@merge_options
@click.pass_context
def export(context: click.Context, /, to: str, **given: Any) -> None:
    """Write what RUNs over one base have learnt, added up, in a form that needs no qdist.

    Any size of model takes a few GiB of host memory. Killed, the same command goes on where it was.
    """
    context.exit(run_module("qdist.runtime.exports.main", (to, *checked_flags(**given))))


def checked_flags(*, runs: tuple[str, ...], out: str, onto: str, dtype: str, weights: str | None) -> list[str]:
    """What the process that writes is told; wrong flags end here, before it starts."""
    factors = _weights(weights, len(runs)) if weights is not None else ()
    for run in map(RunDir, runs):
        run.plan()
        if not run.adapter.is_dir():
            raise RunError(f"{run.path} has no adapter yet", try_=f"qdist gather {run.path}")
    folder = Path(out)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise RunError(f"{out} exists", try_="another --out")
    multiplied = [f"--weights={','.join(map(repr, factors))}"] if factors else []
    return [*runs, "--out", out, "--onto", onto, "--dtype", dtype, *multiplied]


def _weights(text: str, count: int) -> tuple[float, ...]:
    try:
        factors = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SpecError(f"weights cannot be {text!r}", try_="numbers with commas between, such as 0.7,0.3") from None
    if len(factors) != count:
        raise SpecError(f"weights are {len(factors)}, runs are {count}", try_="a weight for each run")
    if not all(map(math.isfinite, factors)):
        raise SpecError(f"weights cannot be {text!r}: they are finite", try_="such as 0.7,0.3")
    return factors
