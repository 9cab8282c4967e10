"""The stack that everybody has: transformers + peft + bitsandbytes in a plain loop, 7B, NF4, 16x512 on one GPU."""

import json
import sys
import time
from statistics import median

import torch
from bitsandbytes.optim import PagedAdamW32bit
from peft import LoraConfig, get_peft_model

from qdist.core.model.aliases import config_of
from qdist.core.model.families import from_config
from qdist.core.planning.plan import Source
from qdist.core.spec.sections import Quant
from qdist.runtime.model.skeleton import load_backbone

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    """Time 12 steps and print a row for bench/throughput.py."""
    checkpointing = sys.argv[1] == "1"
    torch.cuda.set_device(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    source = Source(kind="dummy", path="", config=config_of("llama-7b"), tokenizer="")
    device = torch.device("cuda", 0)
    facts = from_config(source.config, name="llama-7b")
    model = load_backbone(source, bits=4, quant=Quant(), dtype=torch.bfloat16, device=device, facts=facts)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(
        model, LoraConfig(r=64, lora_alpha=16, target_modules=list(NAMES), task_type="CAUSAL_LM")
    ).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = PagedAdamW32bit(trainable, lr=2e-4)
    seconds = []
    for _ in range(12):
        ids = torch.randint(0, 32000, (16, 512), device=device)
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30
    case = f"stock{'' if checkpointing else '-none'}"
    print(
        json.dumps(
            {
                "case": case,
                "tok_s": 8192 / median(seconds[3:]),
                "peak": peak,
                "planned": 0.0,
                "allocated": 0.0,
                "start_s": 0.0,
            }
        )
    )


if __name__ == "__main__":
    main()
