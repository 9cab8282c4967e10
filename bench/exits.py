"""Held-out losses of a QA-LoRA run by every way out of it: `python bench/exits.py RUN [--work FOLDER]`.

The run's adapter, the merged checkpoint, the widened LoRA under plain PEFT, 16 bits, and the three GGUF files read back
by transformers; each beside its difference from the adapter's.
"""

import argparse
import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from qdist.runtime.quiet import quiet

from qdist.core.requests import Export
from qdist.host.run.rundir import RunDir
from qdist.runtime.exports import merged_16bit, qalora_as_lora
from qdist.runtime.exports.gguf import export
from qdist.runtime.exports.merge import Evaluation
from qdist.runtime.exports.qalora_merge import merge_offsets
from qdist.runtime.exports.update import Adapters
from qdist.runtime.infer.load import with_packed
from qdist.runtime.model.skeleton import DTYPES, load_backbone


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where the models are written, 3 GB for SmolLM2")
    arguments = parser.parse_args()
    quiet()
    arguments.work.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(RunDir(arguments.run))
    adapter = value(evaluation.adapter())
    print(f"{'adapter':28}{adapter:.6f}", flush=True)
    for name, way in ways(evaluation, arguments.run, arguments.work).items():
        loss = way()
        print(f"{name:28}{loss:.6f}  {loss - adapter:+.1e}", flush=True)


def ways(evaluation: Evaluation, run: Path, work: Path) -> dict[str, Callable[[], float]]:
    """What gives the loss of each way."""
    return {
        "merged, offsets": lambda: merged(evaluation, run, work / "offsets"),
        "LoRA under plain PEFT": lambda: widened(evaluation, run, work / "lora"),
        "16 bits, float16": lambda: written(evaluation, run, work / "float16", "float16"),
        "16 bits, bfloat16": lambda: written(evaluation, run, work / "bfloat16", "bfloat16"),
        "GGUF Q4_1": lambda: in_gguf(evaluation, run, work / "q4_1" / "model.gguf", "q4_1"),
        "GGUF Q8_0": lambda: in_gguf(evaluation, run, work / "q8_0" / "model.gguf", "q8_0"),
        "GGUF F16": lambda: in_gguf(evaluation, run, work / "f16" / "model.gguf", "f16"),
    }


def merged(evaluation: Evaluation, run: Path, out: Path) -> float:
    """As `qdist merge` writes it."""
    difference = merge_offsets(Adapters([RunDir(run)]), out)
    print(f"{'':28}offsets {difference.relative:.1e} off the update, {difference.unchanged} tensors bit for bit")
    return value(evaluation.quantized(out))


def widened(evaluation: Evaluation, run: Path, out: Path) -> float:
    """PEFT with its own LoRA layers over the packed base."""
    from peft import PeftModel

    qalora_as_lora.widen(Adapters([RunDir(run)]), out)
    plan = evaluation.plan
    backbone = load_backbone(
        with_packed(plan), bits=plan.spec.bits, quant=plan.spec.quant, dtype=DTYPES[plan.compute_dtype],
        device=torch.device("cpu"), facts=plan.facts,
    )  # fmt: skip
    model = PeftModel.from_pretrained(backbone, str(out)).eval()
    return evaluation.held_out(model, DTYPES[plan.compute_dtype])


def written(evaluation: Evaluation, run: Path, out: Path, dtype: Any) -> float:
    """A 16-bit model, read back."""
    merged_16bit.write(Adapters([RunDir(run)]), out, onto="dequantized", dtype=DTYPES[dtype])
    return value(evaluation.written(out, DTYPES[dtype]))


def in_gguf(evaluation: Evaluation, run: Path, out: Path, kind: Any) -> float:
    """A GGUF file, read back by transformers."""
    from transformers import AutoModelForCausalLM

    out.parent.mkdir()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        export.run(Export(to="gguf", runs=(str(run),), out=str(out), type=kind))
    print(f"{'':28}{said.getvalue().splitlines()[0].partition(': ')[2]}")
    model = AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32).eval()
    return evaluation.held_out(model, torch.float32)


def value(loss: Any) -> float:
    """A loss that must be there."""
    if loss.value is None:
        raise SystemExit(str(loss))
    return float(loss.value)


if __name__ == "__main__":
    main()
