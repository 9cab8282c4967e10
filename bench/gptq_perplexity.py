"""Perplexity of a model in 16 bits, NF4, rounded to the nearest, and quantized by GPTQ, all on the same text.

    python bench/gptq_perplexity.py wikitext2_valid.txt [--only gptq ...] [--data alpaca.json]

Evaluates the first windows of the text; GPTQ is calibrated on what follows them, or on --data. Every variant is
dequantized into the same plain float32 transformers model. Group size 128, symmetric, 4 bits.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdist.core.model.gptq import Shape, from_config
from qdist.core.requests import GptqSettings
from qdist.host.sources.models import locate
from qdist.runtime.formats.gptq_folder import Quantized
from qdist.runtime.formats.packed_folder import opened, tensor_files
from qdist.runtime.quantize.gptq.make import make
from qdist.runtime.quantize.gptq.solve import curvature, solve, unpacked
from qdist.runtime.quantize.materialize import materialize
from qdist.runtime.quantize.source import blueprint

SHAPE = Shape(4, 128)
GPTQ: dict[str, dict[str, Any]] = {
    "gptq": {},
    "gptq desc_act": {"desc_act": True},
    "gptq asymmetric": {"sym": False, "format": "gptq_v2"},
    "gptq 3 bits": {"bits": (3,)},
}


def main() -> None:
    """Measure each variant that was asked for, and print its perplexity."""
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--data", help="calibration data in place of the rest of the text")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--only", nargs="+", default=["16-bit", "nf4", "nearest", "nearest searched", *GPTQ])
    given = parser.parse_args()
    folder = materialize(locate(given.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(given.text.read_text(), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    held = given.windows * given.window
    windows = torch.tensor(encoded["input_ids"][:held]).reshape(given.windows, given.window)
    work = Path(tempfile.mkdtemp(prefix="qdist-perplexity-"))
    rest = work / "rest.txt"
    rest.write_text(given.text.read_text()[encoded["offset_mapping"][held][0] :])
    names = sorted(name.removesuffix(".weight") for name in blueprint(folder).linears)
    for variant in given.only:
        began = time.monotonic()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        if variant in GPTQ:
            data = given.data or str(rest)
            wanted = GptqSettings(**{"data": data, "samples": given.samples, "seq_len": given.seq_len, **GPTQ[variant]})
            make(given.model, work / variant, wanted)
            put_back(model, work / variant, names)
            shutil.rmtree(work / variant)
        else:
            for name in names:
                linear = model.get_submodule(name)
                linear.weight.copy_(ROUNDED[variant](linear))
        made = time.monotonic() - began
        print(json.dumps({"variant": variant, "perplexity": round(perplexity(model, windows), 3),
                          "seconds": round(made)}), flush=True)  # fmt: skip
    shutil.rmtree(work)


def nf4(linear: nn.Linear) -> torch.Tensor:
    """bitsandbytes' NF4 with double quantization, there and back."""
    packed, state = quantize_4bit(linear.weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state)


def nearest(linear: nn.Linear, *, search: bool) -> torch.Tensor:
    """Every weight to the nearest value of its group's grid: what GPTQ does where inputs are unrelated."""
    unrelated = curvature(torch.eye(linear.in_features), by_activation=False, name="")
    return solve(linear.weight, unrelated, SHAPE, sym=True, search=search, name="").weight()


ROUNDED: dict[str, Callable[[nn.Linear], torch.Tensor]] = {
    "16-bit": lambda linear: linear.weight,
    "nf4": nf4,
    "nearest": lambda linear: nearest(linear, search=False),
    "nearest searched": lambda linear: nearest(linear, search=True),
}


def put_back(model: nn.Module, folder: Path, names: list[str]) -> None:
    """Fill a plain model with the dequantized weights of a GPTQ checkpoint."""
    gptq = from_config(json.loads((folder / "quantize_config.json").read_text()), name=str(folder))
    files = tensor_files(folder)
    for name in names:
        with opened(folder / files[f"{name}.qweight"]) as handle:
            parts = [handle.get_tensor(f"{name}.{leaf}") for leaf in Quantized._fields[:4]]
        shape = gptq.of(name)
        assert shape is not None
        weight = unpacked(Quantized(*parts), shape.bits, offset=gptq.zero_offset)
        model.get_submodule(name).weight.copy_(weight)


@torch.inference_mode()
def perplexity(model: nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean loss of all tokens but the first of each window, [windows, tokens]."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(logits, window[1:]))
    return math.exp(float(torch.stack(losses).mean()))


if __name__ == "__main__":
    main()
