"""`qdist export`: a run's model for other programs."""

import math
from collections.abc import Mapping
from typing import Any

import click

from qdist.cli.flags import flag_of
from qdist.cli.quantize import check_data, check_group_size
from qdist.core.errors import SpecError
from qdist.core.model.gptq import BITS
from qdist.core.text import argument, quoted
from qdist.host.files import file_to_write, folder_to_write
from qdist.host.launch.tasks import run_module
from qdist.host.run.rundir import RunDir
from qdist.host.sources.targets import require_adapter, require_base, step_note
from qdist.host.terminal import say

TARGETS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "16bit": ("onto", "dtype"),
    "gguf": ("onto", "type"),
    "gptq": ("onto", "data", "samples", "bits", "group_size"),
    "zeros": ("lossy",),
}
"""Name -> the options that it takes beside those of all."""
_GGUF_TYPES = ("q4_1", "q8_0", "f16")


def merge_options(command: Any) -> Any:
    """What every way out of several runs is told."""
    options = (
        click.argument("runs", nargs=-1, required=True, metavar="RUN..."),
        click.option("--out", required=True, help="What to write; must not be there yet."),
        click.option("--weights", metavar="W,W,...", help="What each run's update is multiplied by.  [default: 1]"),
        click.option("--onto", type=click.Choice(["dequantized", "original"]),
                     help="16 bits: the backbone that the adapter was trained on, or the weights before quantization.  "
                     "[default: dequantized]"),
        click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), help="16 bits.  [default: bfloat16]"),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.option("--to", type=click.Choice(list(TARGETS)), required=True,
              help="lora: an ordinary LoRA adapter. 16bit: merged, for plain transformers. gguf: merged, for "
              "llama.cpp. gptq: merged and quantized again. zeros: QA-LoRA in integer zeros.")  # fmt: skip
@merge_options
@click.option("--type", type=click.Choice(_GGUF_TYPES),
              help="gguf.  [default: q4_1 where QA-LoRA's groups allow it, else f16]")  # fmt: skip
@click.option("--data", help="gptq: calibration data.  [default: the run's own]")
@click.option("--samples", type=click.IntRange(min=1), help="gptq: of them.  [default: 128]")
@click.option(
    "--bits", type=click.Choice([str(bits) for bits in BITS]), help="gptq.  [default: as the run's own, or 4]"
)
@click.option("--group-size", type=int, help="gptq.  [default: as the run's own, or 128]")
@click.option("--lossy", is_flag=True, default=None, help="zeros: write them, whatever is lost.")
@click.pass_context
def export(context: click.Context, /, to: str, **given: Any) -> None:
    """Write what RUNs over one base have learnt, added up, in a form that needs no qdist.

    Writing any size of model takes a few GiB of host memory. What is at --out is whole or absent.
    """
    _refuse_foreign(to, given)
    if to == "gguf" and not given["out"].endswith(".gguf"):
        raise SpecError(
            f"{given['out']} is not the name of a GGUF file", try_=quoted("--out", f"{given['out'].rstrip('/')}.gguf")
        )
    if given["data"] is not None:
        check_data(given["data"])
    if given["group_size"] is not None:
        check_group_size(given["group_size"])
    flags = checked_flags(given, to=to)
    context.exit(run_module("qdist.runtime.exports.main", (to, *flags)))


def _refuse_foreign(to: str, given: Mapping[str, Any]) -> None:
    """Options of other targets: none is ignored."""
    own = ("runs", "out", "weights", *TARGETS[to])
    for name, value in given.items():
        if value is not None and name not in own:
            owners = " and ".join(target for target, options in TARGETS.items() if name in options)
            raise SpecError(f"{flag_of(name)} is of --to {owners}, not {to}", try_="leave it out")


def checked_flags(given: Mapping[str, Any], *, to: str) -> list[str]:
    """What the process that writes is told; wrong flags and missing files end here, before it starts.

    to: one of TARGETS.
    """
    runs, out, weights = given["runs"], given["out"], given["weights"]
    factors = _weights(weights, len(runs)) if weights is not None else ()
    for run in map(RunDir, runs):
        run.plan()
        if to != "lora":  # the others take the weights that the adapters lie over
            require_base(run)
        require_adapter(run)
        if note := step_note(run):
            say(f"note     {run.path}: {note}", err=True)
    out = file_to_write(out) if to == "gguf" else folder_to_write(out)
    multiplied = [f"--weights={','.join(map(repr, factors))}"] if factors else []
    others = {name: value for name, value in given.items() if name not in ("runs", "out", "weights")}
    return [*map(argument, runs), "--out", argument(out), *multiplied, *_flags(others)]


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in options.items():
        if value is not None:
            said = [] if value is True else [argument(value) if name == "data" else str(value)]
            flags += [flag_of(name), *said]
    return flags


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
