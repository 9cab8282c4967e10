"""Are the losses of passes replayed as CUDA graphs those of passes launched one by one? For every kind of backbone.

    python bench/graphs.py [--steps 20] [--only NAME,NAME]

Small random models of two layers, in this process, on one GPU. Each row trains the same steps twice; `equal` counts
steps whose losses are the same to the bit, `adapter` says whether the trained tensors are.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import qdist
from qdist.core.model.aliases import lookup

SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 512,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
CASES: dict[str, tuple[str, dict, dict]] = {
    # name: alias of the family, changes to its configuration, settings
    "nf4": ("llama-7b", {}, {}),
    "nf4, recomputed": ("llama-7b", {}, {"train.checkpointing": True}),
    "nf4, dropout": ("llama-7b", {}, {"lora.dropout": 0.1}),
    "nf4, dropout, recomputed": ("llama-7b", {}, {"lora.dropout": 0.1, "train.checkpointing": True}),
    "fp4, float16": ("llama-7b", {}, {"quant.type": "fp4", "dtype": "float16"}),
    "16 bits": ("llama-7b", {}, {"bits": 16}),
    "gptq": ("llama-7b", {}, {"method": "gptq-lora"}),
    "qa-lora": ("llama-7b", {}, {"method": "qa-lora", "quant.group_size": 32}),
    "without Liger": ("llama-7b", {}, {"liger": False}),
    "qwen3": ("qwen3-8b", {}, {}),
    "gemma3, window 64": ("gemma3-12b", {"sliding_window": 64}, {}),
    # Liger changes experts' classes for the whole process, of which the second model is made.
    "experts": ("qwen3-30b-a3b", EXPERTS, {"liger": False}),
    "experts adapted": ("qwen3-30b-a3b", EXPERTS, {"liger": False, "lora.targets": ["all-linear", "experts"]}),
    "mxfp4": (
        "gpt-oss-20b",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 64},
        {"liger": False},
    ),
    "recurrent": (
        "qwen3.5-9b",
        {
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
        {},
    ),
    "fp8": ("llama-7b", {}, {"compute": "fp8"}),
    "8-bit AdamW": ("llama-7b", {}, {"optim.name": "adamw-8bit"}),
}


def main() -> None:
    """Run the cases and print a row for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    wanted = [name for name in CASES if not arguments.only or name in arguments.only.split(",")]
    for name in wanted:
        began = time.perf_counter()
        alias, changes, settings = CASES[name]
        folder = model_of(alias, changes)
        eager, first, _ = trained(folder, settings, arguments.steps, replay=False)
        again, second, why = trained(folder, settings, arguments.steps, replay=True)
        equal = sum(left == right for left, right in zip(eager, again, strict=True))
        apart = max(abs(left / right - 1) for left, right in zip(eager, again, strict=True))
        same = all(torch.equal(left, right) for left, right in zip(first, second, strict=True))
        print(
            f"{name:26} {equal:2} of {len(eager)} losses equal, {apart:.1e} apart at most; adapter "
            f"{'equal' if same else 'differs'}; {why}; {time.perf_counter() - began:.1f} s",
            flush=True,
        )


def model_of(alias: str, changes: dict) -> str:
    """A folder with a small model's configuration."""
    folder = Path(tempfile.mkdtemp(prefix="qdist-graphs-")) / alias
    folder.mkdir()
    config = dict(lookup(alias).config)
    inner = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    inner.update({key: value for key, value in {**SMALL, **changes}.items() if key in inner or key in changes})
    inner.update({key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")})
    if "layer_types" in inner:
        inner["layer_types"] = list(dict.fromkeys(inner["layer_types"]))[:2] * (2 // len(set(inner["layer_types"])))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def trained(model: str, settings: dict, steps: int, *, replay: bool) -> tuple[list[float], list[torch.Tensor], str]:
    """(loss of each step, the adapter, how its passes ran)."""
    from qdist.runtime.engine.torch import MicroBatch
    from qdist.runtime.placements.registry import placement_of
    from qdist.runtime.train.setup import assemble, load_part

    device = torch.device("cuda", 0)
    base = {"load_format": "dummy", "gpus": 1, "steps": steps, "seq_len": 128, "micro_batch": 2, "global_batch": 4}
    plan = qdist.plan(model=model, **{**base, "train.held_out": 0.0, "train.checkpointing": False, **settings})
    place = placement_of(plan, 0, (device,))
    built = assemble(place, None, load_part(place).backbone, pad_id=0)
    engine, samples, losses = built.engine, built.forward.samples, []
    scale = 1024.0 if plan.compute_dtype == "float16" else 1.0
    for step in range(steps):
        own = [
            MicroBatch(lambda chosen=chosen: samples.batch(chosen), 1000 * step + index)
            for index, chosen in enumerate(samples.step(step))
        ]
        losses.append(float(engine.accumulate(own, weight=1 / 508, loss_scale=scale)))
        engine.step(2e-4, scale)
        if step == 1 and engine.replayed and replay:
            engine.replayed.start()
    adapter = [parameter.detach().clone() for parameter in built.adapter.parameters()]
    why = "launched" if engine.replayed is None else engine.replayed.refused or "replayed"
    return losses, adapter, why


if __name__ == "__main__":
    main()
