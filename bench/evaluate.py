"""Are the figures of `qdist evaluate` those of a plain loop over transformers, on every placement and width?

    python -m bench.evaluate mmlu --limit 100       # SmolLM2, 1, 2 and 3 ranks, every placement
    python -m bench.evaluate perplexity --limit 8   # SmolLM2 at 16, 8 and 4 bits, and a GPTQ checkpoint in --gptq

The plain loops are of transformers' own class at batch 1, without padding, in float32: on the dequantized GGUF file; in
8 and 4 bits on the packed folder, which transformers reads and multiplies out; for GPTQ over what `qdist.load` opens.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qdist
from qdist.core.model.storage import packing_of
from qdist.core.spec.run_spec import nest, parse_assignment, resolve
from qdist.host.sources.models import locate
from qdist.runtime.quantize.bitsandbytes import packed_folder
from qdist.runtime.quantize.materialize import materialize

WINDOW = 512
LAID = [("replicate", 1), ("replicate", 2), ("replicate", 3), ("shard", 2), ("shard", 3), ("split", 2), ("split", 3)]


def main() -> None:
    """Print a line a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("mmlu", "perplexity"))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument(
        "--laid", nargs="*", help="such as shard:2", default=[f"{name}:{count}" for name, count in LAID]
    )
    parser.add_argument("--only", nargs="*", help="perplexity: some of its cases, such as nf4 gptq")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the files")
    parser.add_argument("--model", default="smollm2-135m", help="SmolLM2, or its GGUF file")
    parser.add_argument("--gptq", help="a GPTQ folder of SmolLM2, made by qdist quantize")
    given = parser.parse_args()
    if given.what == "mmlu":
        compare_mmlu(given.model, given.data / "mmlu_1000.jsonl", given.limit, given.laid)
    else:
        compare_perplexity(given.data / "wikitext2_valid.txt", given.limit, given.gptq, given.only)


def compare_mmlu(model: str, path: Path, limit: int, laid: list[str]) -> None:
    """Every placement and number of ranks against the plain loop, each subject too."""
    began = time.monotonic()
    plain = plain_mmlu(model, path, limit)
    print(f"plain loop: {plain['macro']:.6f} macro, {plain['micro']:.6f} micro, {time.monotonic() - began:.0f} s")
    for each in laid:
        placement, count = each.split(":")
        began = time.monotonic()
        found = evaluated(model, f"mmlu:{path}", limit, "--placement", placement, "--gpus", count)
        subjects = {name: figure["value"] for name, figure in found["groups"].items()}
        macro, micro = (figure["value"] for figure in found["figures"])
        same = subjects == plain["subjects"] and (macro, micro) == (plain["macro"], plain["micro"])
        took, alone = time.monotonic() - began, found["seconds"]
        print(f"{placement} on {count}: {macro:.6f} macro, {micro:.6f} micro, {'equal' if same else 'DIFFERENT'}, "
              f"{len(subjects)} subjects, {alone:.0f} s of {took:.0f}")  # fmt: skip


def plain_mmlu(name: str, path: Path, limit: int) -> dict[str, Any]:
    """Accuracy by subject, macro and micro, one question at a time."""
    folder = materialize(locate(name))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    letters = [tokenizer(f"Answer: {letter}")["input_ids"][-1] for letter in "ABCD"]
    right: dict[str, list[float]] = defaultdict(list)
    for line in path.read_text().splitlines()[:limit]:
        record = json.loads(line)
        ids = torch.tensor([tokenizer(record["input"])["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
        right[record["subject"]].append(float("ABCD"[int(logits[letters].argmax())] == record["output"]))
    subjects = {name: fmean(own) for name, own in sorted(right.items())}
    every = [each for own in right.values() for each in own]
    return {"subjects": subjects, "macro": fmean(subjects.values()), "micro": fmean(every)}


def compare_perplexity(path: Path, limit: int, gptq: str | None, only: list[str] | None) -> None:
    """Every width against the plain loop over windows."""
    folder = materialize(locate("smollm2-135m"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases = {
        "16 bits": [],
        "8 bits": ["--bits", "8"],
        "nf4": ["--bits", "4"],
        "fp4": ["--bits", "4", "--set", "quant.type=fp4"],
    }
    for name, flags in cases.items():
        if only and name not in only:
            continue
        found = evaluated("smollm2-135m", f"perplexity:{path}", limit, "--window", str(WINDOW), *flags)
        spec = resolve(nest({"model": "smollm2-135m", "bits": 16, **typed(flags)}))
        packed = packed_folder(folder, packing_of(spec), name="smollm2-135m").folder
        plain = plain_perplexity(dequantized(packed), tokenizer, path, limit)
        print_case(name, found["figures"][0]["value"], plain)
    if gptq:
        found = evaluated(gptq, f"perplexity:{path}", limit, "--window", str(WINDOW))
        model, _ = qdist.load(gptq, dtype="float32", device="cpu")
        print_case("gptq", found["figures"][0]["value"], plain_perplexity(model.eval(), tokenizer, path, limit))


def typed(flags: list[str]) -> dict[str, Any]:
    """Settings by key, of flags."""
    words = " ".join(flags).replace("--bits ", "bits=").replace("--set ", "").split()
    return dict(map(parse_assignment, words))


def print_case(name: str, found: float, plain: float) -> None:
    """A line of the table."""
    print(f"{name}: qdist {found:.6f}, plain {plain:.6f}, relative difference {abs(found / plain - 1):.1e}", flush=True)


def dequantized(packed: Path) -> Any:
    """transformers' own class over a packed folder, its weights multiplied out to float32."""
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = torch.float32  # or products of scales and codes are rounded to bfloat16
    return (model.dequantize().float() if hasattr(model, "hf_quantizer") else model).eval()


def plain_perplexity(model: Any, tokenizer: Any, path: Path, limit: int) -> float:
    """Disjoint windows, as transformers' documentation has the loop."""
    ids = torch.tensor(tokenizer(path.read_text())["input_ids"])
    losses, count = 0.0, 0
    for start in range(0, limit * WINDOW, WINDOW):
        own = ids[start : start + WINDOW][None]
        with torch.no_grad():
            logits = model(input_ids=own).logits[0, :-1].double()  # in float32, torch's CPU kernel is 8e-6 off
        losses += float(torch.nn.functional.cross_entropy(logits, own[0, 1:], reduction="sum"))
        count += own.shape[1] - 1
    return math.exp(losses / count)


def evaluated(target: str, task: str, limit: int, *flags: str) -> dict[str, Any]:
    """The result of the only task of the only model."""
    command = [sys.executable, "-m", "qdist", "evaluate", target, "--tasks", task, "--limit", str(limit), "--json"]
    done = subprocess.run([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    found: dict[str, Any] = json.loads(done.stdout)["evaluations"][0]["results"][0]
    return found


if __name__ == "__main__":
    main()
