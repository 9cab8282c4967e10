"""Losses of 20 steps beside a plain transformers + peft + bitsandbytes loop on the same micro-batches.

    python bench/parity.py DATA [--steps 20]

SmolLM2-135M, NF4 with double quantization, LoRA r=16, batch 8, on the CPU. Prints both losses of every step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qdist.core.telemetry.events import decode_lines, losses
from qdist.host.run.rundir import RunDir
from qdist.runtime.data.batches import read_samples

SETTINGS = [
    "steps=20",
    "global_batch=8",
    "seq_len=256",
    "lora.r=16",
    "lora.alpha=32",
    "optim.lr=3e-4",
    "optim.clip=0.3",
]


def main() -> None:
    """Train twice and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--gpus", default="2")
    arguments = parser.parse_args()
    run = RunDir(Path(tempfile.mkdtemp(prefix="qdist-parity-")) / "run")
    command = [sys.executable, "-m", "qdist", "launch", "--gpus", arguments.gpus, "--model", "smollm2-135m"]
    command += ["--data", arguments.data, "--run", str(run.path)]
    for setting in SETTINGS:
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    ours = list(losses(decode_lines(run.event_file(0).read_bytes())).values())
    theirs = plain_losses(run)
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        print(f"step {step:2}  qdist {a:.6f}  plain {b:.6f}  difference {abs(a - b):.1e}")
    print(json.dumps({"data": arguments.data, "steps": len(ours), "largest_difference": worst}))


def plain_losses(run: RunDir) -> list[float]:
    """Everybody's loop: full logits, the model's own loss, torch's AdamW, one process."""
    plan = run.plan()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        plan.source.path, quantization_config=quantization, dtype=torch.float32
    )
    torch.manual_seed(0)
    names = sorted(plan.facts.linear_names)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM")).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-4, weight_decay=0.0)
    samples = read_samples(plan, pad_id=0)
    found = []
    for step in range(plan.steps):
        batches = [samples.batch(indices) for indices in samples.step(step)]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            given = {key: batch[key] for key in ("input_ids", "labels")}
            loss = model(**given, num_items_in_batch=torch.tensor(tokens)).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trainable, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


if __name__ == "__main__":
    main()
