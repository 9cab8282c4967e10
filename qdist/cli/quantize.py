"""`qdist quantize`: pack a model's weights once, as a folder that plain transformers loads too."""

from collections.abc import Mapping
from typing import Any

import click

from qdist.cli.flags import flag_of
from qdist.cli.kept import run_kept
from qdist.core.data import demo
from qdist.core.errors import SpecError, nearest
from qdist.core.model.gptq import BITS, FORMATS, WORD, usual_format
from qdist.core.text import argument
from qdist.host.data.files import is_plain_text
from qdist.host.data.records import check_source
from qdist.host.files import folder_to_write
from qdist.host.sources.targets import check_model

METHODS = ("nf4", "fp4", "int8", "gptq")
_OF_GPTQ = ("data", "bits", "candidate_bits", "max_error", "group_size", "sym", "desc_act", "format", "samples",
            "seq_len", "seed", "damping")  # fmt: skip
_OF_BITSANDBYTES = ("double", "dtype")


@click.command()
@click.argument("model")
@click.option("--method", default="nf4", show_default=True, metavar="|".join(METHODS),
              help="4-bit normal floats, 4-bit floats, LLM.int8, or GPTQ.")  # fmt: skip
@click.option("--double/--no-double", default=None, help="Quantize the scales of 4-bit blocks too.  [default: double]")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default=None,
              help="Of what is not packed, and what is packed from; by default as the model is stored.")  # fmt: skip
@click.option("--out", required=True, help="Folder to write; must be empty or absent.")
@click.option("--data", help="GPTQ: calibration data, a .txt file or what `launch --data` takes.")
@click.option("--bits", type=int, help="GPTQ: 2, 3, 4 or 8.  [default: 4]")
@click.option("--group-size", type=int, help="GPTQ: inputs that share a scale; -1: all.  [default: 128]")
@click.option("--sym/--no-sym", default=None, help="GPTQ: zeros in the middle of the range.  [default: sym]")
@click.option("--desc-act", is_flag=True, default=None, help="GPTQ: take inputs by falling activation.")
@click.option("--candidate-bits", metavar="B,B,...", help="GPTQ: for each linear the narrowest of these widths...")
@click.option(
    "--max-error", type=float, help="...whose outputs, of the samples, have a relative squared error up to this."
)
@click.option(
    "--format", type=click.Choice(FORMATS), help="GPTQ: of the files.  [default: gptq where all read it alike]"
)
@click.option("--samples", type=click.IntRange(min=1), help="GPTQ: calibration samples.  [default: 128]")
@click.option("--seq-len", type=click.IntRange(min=1), help="GPTQ: tokens of each.  [default: 2048, if the model can]")
@click.option("--seed", type=click.IntRange(min=0), help="GPTQ: of the choice of samples.  [default: 0]")
@click.option("--damping", type=float, help="GPTQ: part of the Hessian's mean diagonal added to it.  [default: 0.01]")
@click.pass_context
def quantize(context: click.Context, /, model: str, method: str, out: str, **options: Any) -> None:
    """Pack the decoder's linear layers of MODEL: an alias, a folder, a GGUF file or a hub id.

    The folder is a complete model for transformers and for `qdist launch --model`. Killed, the same command goes on
    where it was.
    """
    given = {name: value for name, value in options.items() if value is not None}
    _check_method(method, given)
    if method == "gptq":
        module, flags = "qdist.runtime.quantize.gptq.make", _gptq_flags(given)
    else:
        module, flags = "qdist.runtime.quantize.bitsandbytes", _flags(method, given)
    check_model(model)
    context.exit(run_kept(module, (argument(model), argument(folder_to_write(out)), *flags)))


def _check_method(method: str, given: Mapping[str, Any]) -> None:
    if method not in METHODS:
        raise SpecError(
            f"method cannot be {method!r}: it is one of {', '.join(METHODS)}",
            try_=f"--method {nearest(method, METHODS) or METHODS[0]}",
        )
    others = _OF_BITSANDBYTES if method == "gptq" else _OF_GPTQ
    foreign = [flag_of(name) for name in others if name in given]
    if foreign:
        owner = "nf4, fp4 and int8" if method == "gptq" else "gptq"
        raise SpecError(f"{', '.join(foreign)}: {owner} alone, not {method}", try_="leave it out")
    if method == "int8" and "double" in given:
        raise SpecError("--double and --no-double describe 4-bit blocks; int8 has one scale a row", try_="leave it out")


def _flags(method: str, given: Mapping[str, Any]) -> list[str]:
    single = ["--single"] if given.get("double") is False else []
    return ["--method", method, *single, *(["--dtype", given["dtype"]] if "dtype" in given else [])]


def _gptq_flags(given: Mapping[str, Any]) -> list[str]:
    """What the process that quantizes is told; wrong settings and missing data end here."""
    data = given.get("data")
    if data is None:
        raise SpecError("gptq needs calibration data", try_="--data FILE, such as what it will be trained on")
    widths, size, damping = _widths(given), given.get("group_size", 128), given.get("damping", 0.01)
    check_group_size(size)
    if not 0 < damping <= 1:
        raise SpecError(f"damping cannot be {damping:g}: it is above 0 and at most 1", try_="--damping 0.01")
    check_data(data)
    sym = given.get("sym", True)
    flags = ["--data", argument(data), "--bits", *map(str, widths), "--group-size", str(size)]
    flags += ["--damping", f"{damping:g}", "--format", given.get("format", usual_format(sym=sym, widths=widths))]
    for name in ("max_error", "samples", "seq_len", "seed"):
        flags += [flag_of(name), str(given[name])] if name in given else []
    return flags + ["--no-sym"] * (not sym) + ["--desc-act"] * ("desc_act" in given)


def _widths(given: Mapping[str, Any]) -> list[int]:
    """The widths to try, narrowest first."""
    mixed = "candidate_bits" in given
    if mixed and "bits" in given:
        raise SpecError("--bits and --candidate-bits both say how wide weights are", try_="one of them")
    if mixed != ("max_error" in given):
        raise SpecError("--candidate-bits and --max-error go together", try_="--candidate-bits 2,3,4 --max-error 0.05")
    if mixed and not 0 < given["max_error"] < 1:
        raise SpecError(f"max error cannot be {given['max_error']:g}: it is between 0 and 1", try_="--max-error 0.05")
    stated = given["candidate_bits"].split(",") if mixed else [str(given.get("bits", 4))]
    wrong = [width for width in stated if width.strip() not in map(str, BITS)]
    if wrong:
        flag = "--candidate-bits 2,3,4" if mixed else "--bits 4"
        raise SpecError(f"bits cannot be {wrong[0]}: GPTQ has 2, 3, 4 or 8", try_=flag)
    return sorted({int(width) for width in stated})


def check_group_size(size: int) -> None:
    """Refuse what readers of GPTQ checkpoints have no kernels for."""
    if size != -1 and (size <= 0 or size % WORD):
        raise SpecError(f"group size cannot be {size}: it is -1 or a multiple of {WORD}", try_="--group-size 128")


def check_data(source: str) -> None:
    """Plain text is cut into samples as it is; anything else is read as for training."""
    if source != demo.NAME and not is_plain_text(source):
        check_source(source)
