"""Tokens/s of whole optimizer steps at many shapes, in one process: a model is loaded once for all shapes of a setting.

    python bench/steps.py [--only NAME,NAME] [--times 8]

Random weights and tokens on one GPU. Runs with any commit's code that is first in PYTHONPATH, to compare two of them on
one machine. tok/s are of the median step, GiB are torch's reserved bytes. The last lines are the table.
"""

import argparse
import gc
import os
import time
from statistics import median

import torch

import qdist

CKPT, NONE = {"train.checkpointing": True}, {"train.checkpointing": False}
QA = {"method": "qa-lora", "quant.group_size": 32}
R16 = {"lora.r": 16}
CASES: dict[str, tuple[str, dict, tuple[tuple[int, int], ...]]] = {
    # name: model, settings, shapes (rows, tokens)
    "7b none": ("llama-7b", NONE, ((1, 512), (2, 512), (4, 512), (16, 512))),
    "7b ckpt": ("llama-7b", CKPT, ((2, 512), (16, 512))),
    "7b dropout": ("llama-7b", {**NONE, "lora.dropout": 0.1}, ((2, 512), (16, 512))),
    "7b fp8": ("llama-7b", {**NONE, "compute": "fp8"}, ((2, 512), (16, 512))),
    "7b gptq": ("llama-7b", {**NONE, "method": "gptq-lora"}, ((2, 512), (16, 512))),
    "7b qa": ("llama-7b", {**NONE, **QA}, ((2, 512), (16, 512))),
    "qwen3-30b-a3b": ("qwen3-30b-a3b", {**NONE, "lora.r": 16}, ((16, 512),)),
    "qwen3-30b-a3b experts": (
        "qwen3-30b-a3b",
        {**NONE, "lora.r": 16, "lora.targets": ["all-linear", "experts"]},
        ((16, 512),),
    ),
    "65b ckpt": ("llama-65b", {**CKPT, "max_memory": "48GiB"}, ((4, 512),)),
    # Shapes and families that no term of the speed model was fitted to.
    "new llama-7b": ("llama-7b", {**NONE, **R16}, ((1, 512), (2, 1024))),
    "new qwen3-8b": ("qwen3-8b", {**NONE, "lora.r": 32}, ((3, 777), (1, 4096))),
    "new gemma3-12b": ("gemma3-12b", {**NONE, **R16}, ((2, 512),)),
    "new gemma3-12b ckpt": ("gemma3-12b", {**CKPT, **R16}, ((4, 1024),)),
    "new olmo2-7b": ("olmo2-7b", {**NONE, **R16}, ((1, 2048),)),
    "new granite-8b": ("granite-8b", {**NONE, **R16}, ((8, 512),)),
    "new qwen3-30b-a3b": ("qwen3-30b-a3b", {**NONE, **R16}, ((4, 512), (2, 2048))),
    "new pythia-12b": ("pythia-12b", {**NONE, **R16}, ((2, 640),)),
    "new mistral-7b": ("mistral-7b", {**NONE, **R16}, ((4, 1024),)),
    "65b ckpt fp8": ("llama-65b", {**CKPT, "max_memory": "48GiB", "compute": "fp8"}, ((4, 512),)),
}


def main() -> None:
    """Time every case and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="7b none,7b ckpt,7b dropout")
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after so many")
    arguments = parser.parse_args()
    began, lines = time.perf_counter(), []
    only = arguments.only.split(",")
    wanted = [name for name in CASES if any(name == own or (own == "new" and name[:3] == own) for own in only)]
    for name in wanted:
        if time.perf_counter() - began < arguments.seconds:
            lines += measured(name, arguments.times)
    print(f"of {os.path.dirname(qdist.__file__)}")
    print("\n".join(lines))
    errors = sorted(abs(float(line.rpartition("(")[2].rpartition(" %")[0])) for line in lines if line.endswith(" %)"))
    if errors:
        print(f"speed: median error {median(errors):.1f} %, worst {errors[-1]:.1f} %, of {len(errors)}")


def measured(name: str, times: int) -> list[str]:
    """A row for each shape of a case."""
    model, settings, shapes = CASES[name]
    rows, lines = max(rows for rows, _ in shapes), []
    began = time.perf_counter()
    plan, built = loaded(model, settings, rows, shapes[0][1])
    start = time.perf_counter() - began
    for rows, tokens in shapes:
        step_s, losses = timed(built, rows, tokens, times)
        expected = planned(model, settings, rows, tokens).tokens_per_second
        reserved = torch.cuda.max_memory_reserved() / 2**30
        lines.append(
            f"{name:22} {rows:2}x{tokens:<5} {rows * tokens / step_s:9,.0f} tok/s {1e3 * step_s:8.1f} ms "
            f"{reserved:6.2f} GiB, loss {losses[0]:.6f} to {losses[-1]:.6f}; loaded in {start:.0f} s; predicted "
            f"{expected:,.0f} ({100 * (expected * step_s / (rows * tokens) - 1):+.1f} %)"
        )
        print(lines[-1], flush=True)
        torch.cuda.reset_peak_memory_stats()
    del plan, built
    gc.collect()
    torch.cuda.empty_cache()
    return lines


def planned(model: str, settings: dict, rows: int, tokens: int):
    """The plan of a case."""
    base = {"load_format": "dummy", "gpus": 1, "steps": 4, "seq_len": tokens, "train.held_out": 0.0}
    shape = {"micro_batch": rows, "global_batch": rows, "optim.name": "adamw"}
    return qdist.plan(model=model, **{**base, **shape, **settings})


def loaded(model: str, settings: dict, rows: int, tokens: int):
    """The plan of a case, and its model with an engine."""
    from qdist.runtime.placements.registry import placement_of
    from qdist.runtime.train.setup import assemble, load_part

    plan = planned(model, settings, rows, tokens)
    place = placement_of(plan, 0, (torch.device("cuda", 0),))
    return plan, assemble(place, None, load_part(place).backbone, pad_id=0)


def timed(built, rows: int, tokens: int, times: int) -> tuple[float, list[float]]:
    """(seconds of the median step, losses)."""
    from qdist.runtime.engine.torch import MicroBatch

    ids = torch.randint(0, 32000, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    where = torch.arange(rows * tokens).view(rows, tokens)[:, :-1].reshape(-1)
    batch = {"input_ids": ids, "labels": ids, "picked": where, "targets": ids[:, 1:].reshape(-1).contiguous()}
    replayed, taken, losses = getattr(built.engine, "replayed", None), [], []
    if replayed:
        replayed.start()
    for step in range(times + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        total = built.engine.accumulate([MicroBatch(lambda: batch, step)], weight=1 / where.numel(), loss_scale=1.0)
        built.engine.step(1e-4, 1.0)
        losses.append(float(total) / where.numel())
        taken.append(time.perf_counter() - began)
    if replayed and replayed.refused:
        print(f"    launched: {replayed.refused}")
    return median(taken[3:]), losses


if __name__ == "__main__":
    main()
