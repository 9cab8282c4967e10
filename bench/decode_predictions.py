"""Predicted beside measured: tokens/s and memory of models that answer, as one table. Needs no GPU.

    python bench/decode.py --json decode.jsonl                  # on the GPU, once a model and method
    python bench/decode_predictions.py [decode.jsonl]

Rates are those of the H200s of bench/predictions.py. Memory is what torch reserves, without CUDA's context.
"""

import sys
from pathlib import Path
from statistics import median

import msgspec
from predictions import H200

from qdist.core.machine.cluster import hypothetical
from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.planning.answering import Questions, memory_of_answers
from qdist.core.planning.decoding import step_seconds, why_launched
from qdist.core.planning.memory import Sizes, sizes
from qdist.core.planning.resources import shape_of
from qdist.core.spec.run_spec import nest, resolve
from qdist.core.text import GIB
from qdist.host.sources.model_folder import gptq_of

CASES = (
    ("llama-7b", "qlora", 1), ("llama-7b", "qlora", 8), ("llama-7b", "qlora", 32), ("llama-7b", "gptq-lora", 1),
    ("llama-7b", "gptq-lora", 32), ("llama-65b", "qlora", 1), ("llama-65b", "qlora", 32), ("qwen3-8b", "qlora", 8),
)  # fmt: skip
"""What the bars are of, predicted alone where nothing was measured."""


class Measured(msgspec.Struct):
    """A line of bench/decode.py."""

    model: str
    method: str
    rows: int
    prompt: int = 64
    new: int = 256
    tokens_per_second: float = 0.0
    reserved: int = 0


def main() -> None:
    """Print the table."""
    lines = Path(sys.argv[1]).read_text().splitlines() if len(sys.argv) > 1 else []
    runs = [msgspec.json.decode(line, type=Measured) for line in lines] or [Measured(*case) for case in CASES]
    print(f"{'':28}{'tok/s':>8}{'measured':>10}{'':>9}{'GiB':>8}{'measured':>10}")
    of_speed, of_memory = [], []
    for run in runs:
        speed, memory = predict(run)
        row = f"{run.model:12}{run.method:11}{run.rows:4} "
        row += f"{speed:8,.0f}{beside(speed, run.tokens_per_second, 1)} {memory / GIB:7.2f}"
        print((row + beside(memory, run.reserved, GIB)).rstrip())
        of_speed += [abs(speed / run.tokens_per_second - 1)] if run.tokens_per_second else []
        of_memory += [abs(memory / run.reserved - 1)] if run.reserved else []
    for name, errors in (("tokens/s", of_speed), ("memory", of_memory)):
        if errors:
            print(f"{name}: median error {median(errors):.1%}, worst {max(errors):.1%}")


def beside(predicted: float, measured: float, unit: int) -> str:
    """What was measured, and how far off the prediction is."""
    if not measured:
        return f"{'-':>10}{'':9}"
    digits = 2 if unit == GIB else 0
    return f"{measured / unit:10,.{digits}f} {predicted / measured - 1:+8.1%}"


def predict(run: Measured) -> tuple[float, int]:
    """(tokens/s, bytes that torch reserves)."""
    parts = parts_of(run)
    questions = Questions(run.rows, run.prompt + run.new)
    captured = not why_launched(parts.facts, parts.job)
    seconds = step_seconds(parts, H200, run.rows, filled=run.prompt + run.new / 2, captured=captured)
    memory = memory_of_answers(parts, questions, device="cuda")
    return run.rows / seconds, memory.total - memory.context


def parts_of(run: Measured) -> Sizes:
    """The parts of the model that bench/decode.py makes."""
    config = config_of(run.model)
    facts = from_config(config, name=run.model)
    spec = resolve(nest({"model": run.model, "method": run.method, "load_format": "dummy", "steps": 1, "lora.r": 64}))
    job = shape_of(
        spec, facts, hypothetical(1, 140 * GIB, name="H200"), config=config, gptq=gptq_of(spec, config),
        dtype="bfloat16", liger=True, recurrence=None,
    )  # fmt: skip
    return sizes(facts, job)


if __name__ == "__main__":
    main()
