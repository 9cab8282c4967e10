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
    for name in arguments.only.split(","):
        if time.perf_counter() - began < arguments.seconds:
            lines += measured(name, arguments.times)
    print(f"of {os.path.dirname(qdist.__file__)}")
    print("\n".join(lines))


def measured(name: str, times: int) -> list[str]:
    """A row for each shape of a case."""
    model, settings, shapes = CASES[name]
    rows, lines = max(rows for rows, _ in shapes), []
    began = time.perf_counter()
    plan, built = loaded(model, settings, rows, shapes[0][1])
    start = time.perf_counter() - began
    for rows, tokens in shapes:
        step_s, losses = timed(built, rows, tokens, times)
        reserved = torch.cuda.max_memory_reserved() / 2**30
        lines.append(
            f"{name:22} {rows:2}x{tokens:<5} {rows * tokens / step_s:9,.0f} tok/s {1e3 * step_s:8.1f} ms "
            f"{reserved:6.2f} GiB, loss {losses[0]:.6f} to {losses[-1]:.6f}; loaded in {start:.0f} s"
        )
        print(lines[-1], flush=True)
        torch.cuda.reset_peak_memory_stats()
    del plan, built
    gc.collect()
    torch.cuda.empty_cache()
    return lines


def loaded(model: str, settings: dict, rows: int, tokens: int):
    """The plan of a case, and its model with an engine."""
    from qdist.runtime.placements.registry import placement_of
    from qdist.runtime.train.setup import assemble, load_part

    base = {"load_format": "dummy", "gpus": 1, "steps": 4, "seq_len": tokens, "train.held_out": 0.0}
    plan = qdist.plan(
        model=model, **{**base, "micro_batch": rows, "global_batch": rows, "optim.name": "adamw", **settings}
    )
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
