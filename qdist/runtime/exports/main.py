"""`python -m qdist.runtime.exports.main TARGET RUN... --out OUT`: started by the command line, which checks flags."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from qdist.core.model.gptq import BITS
from qdist.runtime.exports.job import Export
from qdist.runtime.quiet import quiet

TARGETS = {
    "lora": "qdist.runtime.exports.qalora_as_lora",
    "16bit": "qdist.runtime.exports.merged_16bit",
    "gguf": "qdist.runtime.exports.gguf.export",
    "gptq": "qdist.runtime.exports.requantize",
    "zeros": "qdist.runtime.exports.qalora_integer_zeros",
}
"""Name -> the module whose `run` takes an `Export`."""


def parser() -> argparse.ArgumentParser:
    """What all targets are told."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("runs", type=Path, nargs="+")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--weights", type=_numbers, default=())
    arguments.add_argument("--onto", choices=("dequantized", "original"), default="dequantized")
    arguments.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    arguments.add_argument("--type", choices=("q4_1", "q8_0", "f16"))
    arguments.add_argument("--data", default="")
    arguments.add_argument("--samples", type=int, default=128)
    arguments.add_argument("--bits", type=int, choices=BITS)
    arguments.add_argument("--group-size", type=int)
    arguments.add_argument("--lossy", action="store_true")
    return arguments


def job_from(given: argparse.Namespace) -> Export:
    """The job that flags describe."""
    return Export(**{**vars(given), "runs": tuple(given.runs)})


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def main() -> None:
    """Started by the command line, through `qdist.runtime.child`."""
    target, *flags = sys.argv[1:]
    quiet()
    import_module(TARGETS[target]).run(job_from(parser().parse_args(flags)))


if __name__ == "__main__":
    main()
