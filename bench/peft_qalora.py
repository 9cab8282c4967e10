"""PEFT's own QA-LoRA on GPTQModel's layers beside ours: `python bench/peft_qalora.py BASE ADAPTER LOGITS.safetensors`.

BASE: a GPTQ checkpoint. ADAPTER: what PEFT saved with `use_qalora` on it, in an environment of its own. LOGITS: that
model's `input_ids` and logits, under the names of the types that it computed in (`float32`, `float16`).
"""

import argparse
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

import qdist
from qdist.runtime.adapters.attach import FusedLora


def main() -> None:
    """Print how far the logits are from each other, for each type."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("logits", type=Path)
    given = parser.parse_args()
    theirs = load_file(given.logits)
    for dtype in ("float32", "float16"):
        model, _ = qdist.load(given.base, dtype=dtype, device="cpu")
        config = PeftConfig.from_pretrained(given.adapter)
        config._register_custom_module({nn.Linear: FusedLora})
        adapted = PeftModel.from_pretrained(model, given.adapter, config=config).eval()
        with torch.no_grad():
            ours = adapted(input_ids=theirs["input_ids"]).logits.float()
        wanted = theirs[dtype].float()
        norm = float((ours - wanted).norm() / wanted.norm())
        furthest = float((ours - wanted).abs().max() / wanted.abs().max())
        print(f"{dtype}: {norm:.1e} of the norm, {furthest:.1e} of the largest")


if __name__ == "__main__":
    main()
