"""Predicted and measured memory and speed of many different runs on this machine's GPUs, as one Markdown table.

    python bench/runs.py [--only NAME,NAME] [--skip NAME] [--steps 8] [--out FOLDER]

Random weights, random tokens, nothing to download. Runs of one GPU are started side by side, one on each GPU; runs
that need more GPUs than there are, are left out and named. Each run is one `qdist launch`, and its figures are those
of its own result.json. With `--at-once N` N runs share a GPU: its memory is theirs alone all the same, speeds are not.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from statistics import median

from qdist.host.files import cache_dir

GIB = 2**30
LONGEST_S = 150
"""A run that takes longer is stopped and counts as failed."""
SHAPE = "seq_len=512 train.held_out=0.0 train.save_steps=1000"
QA = "--method qa-lora"
CKPT, NONE = "train.checkpointing=true", "train.checkpointing=false"
R16, EXPERTS = "lora.r=16", 'lora.targets=["all-linear","experts"]'
SPEED_RUNS = (
    ("llama-7b", 1, 512, NONE), ("llama-7b", 2, 1024, CKPT), ("qwen3-8b", 3, 777, NONE), ("qwen3-8b", 1, 4096, NONE),
    ("gemma3-12b", 2, 512, NONE), ("gemma3-12b", 4, 1024, CKPT), ("olmo2-7b", 1, 2048, NONE),
    ("granite-8b", 8, 512, NONE), ("qwen3-30b-a3b", 4, 512, NONE), ("qwen3-30b-a3b", 2, 2048, NONE),
    ("pythia-12b", 2, 640, NONE), ("mistral-7b", 4, 1024, NONE),
)  # fmt: skip
"""Runs of one GPU whose speed no term was fitted to, over small and large micro-batches: `--match speed18`."""
RUNS: dict[str, tuple[int, str, str]] = {
    # name: GPUs, flags, settings
    "7b ckpt 16x512": (1, "llama-7b", f"global_batch=16 micro_batch=16 {CKPT}"),
    "7b none 16x512": (1, "llama-7b", f"global_batch=16 micro_batch=16 {NONE}"),
    "7b auto 40GiB": (1, "llama-7b --max-memory 40GiB", "global_batch=32"),
    "7b auto 16GiB": (1, "llama-7b --max-memory 16GiB", "global_batch=16"),
    "7b 4x2048": (1, "llama-7b", f"global_batch=4 micro_batch=4 seq_len=2048 {CKPT}"),
    "7b 2x512 x8 none": (1, "llama-7b", f"global_batch=16 micro_batch=2 {NONE}"),
    "7b int8 ckpt": (1, "llama-7b --bits 8", f"global_batch=16 micro_batch=16 {CKPT}"),
    "7b 16-bit ckpt": (1, "llama-7b --bits 16", f"global_batch=16 micro_batch=16 {CKPT}"),
    "7b fp16 r=16": (1, "llama-7b", f"global_batch=16 micro_batch=8 lora.r=16 dtype=float16 {CKPT}"),
    "8b llama3 none": (1, "llama3-8b", f"global_batch=8 micro_batch=8 {NONE}"),
    "7b qwen2.5": (1, "qwen2.5-7b", f"global_batch=8 micro_batch=8 {CKPT}"),
    "13b auto 24GiB": (1, "llama-13b --max-memory 24GiB", "global_batch=16"),
    "33b ckpt 8x512": (1, "llama-33b", f"global_batch=8 micro_batch=8 {CKPT}"),
    "65b 48GiB 4x512": (1, "llama-65b --max-memory 48GiB", "global_batch=4 micro_batch=4"),
    "7b gptq ckpt": (1, "llama-7b --method gptq-lora", f"global_batch=16 micro_batch=16 {CKPT}"),
    "7b gptq none": (1, "llama-7b --method gptq-lora", f"global_batch=16 micro_batch=16 {NONE}"),
    "65b x2 gptq shard": (2, "llama-65b --method gptq-lora --placement shard --max-memory 32GiB", "global_batch=32"),
    "65b x4 gptq shard": (4, "llama-65b --method gptq-lora --placement shard --max-memory 24GiB", "global_batch=64"),
    "7b qa ckpt": (1, f"llama-7b {QA}", f"global_batch=16 micro_batch=16 quant.group_size=32 {CKPT}"),
    "7b qa none": (1, f"llama-7b {QA}", f"global_batch=16 micro_batch=16 quant.group_size=32 {NONE}"),
    "7b qa auto": (1, f"llama-7b {QA}", "global_batch=16 quant.group_size=32"),
    "7b gptq g32 none": (
        1,
        "llama-7b --method gptq-lora",
        f"global_batch=16 micro_batch=16 quant.group_size=32 {NONE}",
    ),
    "65b x2 qa shard": (
        2,
        f"llama-65b {QA} --placement shard --max-memory 32GiB",
        "global_batch=32 quant.group_size=32",
    ),
    "7b 8 layers in host memory": (
        1,
        "llama-7b --placement split",
        "split.schedule=sequential split.offload_layers=8 global_batch=16 micro_batch=16",
    ),
    "7b x2 replicate none": (2, "llama-7b --placement replicate", f"global_batch=32 micro_batch=16 {NONE}"),
    "7b x2 zero0 ckpt": (2, "llama-7b --placement replicate", f"global_batch=32 micro_batch=16 zero.stage=0 {CKPT}"),
    "7b x2 zero3 ckpt": (2, "llama-7b --placement replicate", f"global_batch=32 micro_batch=16 zero.stage=3 {CKPT}"),
    "13b x2 auto 16GiB": (2, "llama-13b --max-memory 16GiB", "global_batch=32"),
    "7b x2 shard none": (2, "llama-7b --placement shard", f"global_batch=32 micro_batch=16 {NONE}"),
    "7b x2 shard int8": (2, "llama-7b --placement shard --bits 8", f"global_batch=16 micro_batch=8 {CKPT}"),
    "65b x2 shard 32GiB": (2, "llama-65b --placement shard --max-memory 32GiB", "global_batch=32"),
    "33b x2 shard 24GiB": (2, "llama-33b --placement shard --max-memory 24GiB", "global_batch=32"),
    "7b x2 split": (2, "llama-7b --placement split", f"global_batch=64 micro_batch=8 {CKPT}"),
    "13b x2 split none": (2, "llama-13b --placement split", f"global_batch=64 micro_batch=4 {NONE}"),
    "65b x2 split 32GiB": (2, "llama-65b --placement split --max-memory 32GiB", "global_batch=32"),
    "65b x2 auto 40GiB": (2, "llama-65b --max-memory 40GiB", "global_batch=32"),
    "13b sequential": (2, "llama-13b --placement split", f"split.schedule=sequential global_batch=8 {CKPT}"),
    "65b x4 shard 24GiB": (4, "llama-65b --placement shard --max-memory 24GiB", "global_batch=64"),
    "65b x4 split 24GiB": (4, "llama-65b --placement split --max-memory 24GiB", "global_batch=128"),
    "65b 2x2 shard 32GiB": (4, "llama-65b --placement shard --gpus-per-group 2 --max-memory 32GiB", "global_batch=64"),
    "65b 2x2 split 32GiB": (4, "llama-65b --placement split --gpus-per-group 2 --max-memory 32GiB", "global_batch=64"),
    "7b x4 replicate none": (4, "llama-7b --placement replicate", f"global_batch=64 micro_batch=16 {NONE}"),
    "gemma3-12b ckpt 8x512": (1, "gemma3-12b", f"global_batch=8 micro_batch=8 {R16} {CKPT}"),
    "gemma3-12b none 1x2048": (1, "gemma3-12b", f"global_batch=1 micro_batch=1 seq_len=2048 {R16} {NONE}"),
    "qwen3-30b-a3b 24GiB": (1, "qwen3-30b-a3b --max-memory 24GiB", f"global_batch=16 {R16}"),
    "qwen3-30b-a3b 32GiB experts": (1, "qwen3-30b-a3b --max-memory 32GiB", f"global_batch=16 {R16} {EXPERTS}"),
    "qwen3-30b-a3b 16x512": (1, "qwen3-30b-a3b", f"global_batch=16 micro_batch=16 {R16} {NONE}"),
    "qwen3-30b-a3b 16x512 experts": (1, "qwen3-30b-a3b", f"global_batch=16 micro_batch=16 {R16} {EXPERTS} {NONE}"),
    "qwen3.5-9b none 8x512": (1, "qwen3.5-9b", f"global_batch=8 micro_batch=8 {R16} {NONE}"),
    "qwen3.5-9b ckpt 2x2048": (1, "qwen3.5-9b", f"global_batch=2 micro_batch=2 seq_len=2048 {R16} {CKPT}"),
    "phi-4 ckpt 8x512": (1, "phi-4", f"global_batch=8 micro_batch=8 {R16} {CKPT}"),
    "phi-4 none 2x1024": (1, "phi-4", f"global_batch=2 micro_batch=2 seq_len=1024 {R16} {NONE}"),
    "gpt-oss-20b 24GiB": (1, "gpt-oss-20b --max-memory 24GiB", f"global_batch=16 {R16}"),
    "gpt-oss-20b ckpt 8x512": (1, "gpt-oss-20b", f"global_batch=8 micro_batch=8 {R16} {CKPT}"),
    "granite-8b none 8x512": (1, "granite-8b", f"global_batch=8 micro_batch=8 {R16} {NONE}"),
    "granite-8b ckpt 2x2048": (1, "granite-8b", f"global_batch=2 micro_batch=2 seq_len=2048 {R16} {CKPT}"),
    "olmo2-7b none 8x512": (1, "olmo2-7b", f"global_batch=8 micro_batch=8 {R16} {NONE}"),
    "olmo2-7b ckpt 2x2048": (1, "olmo2-7b", f"global_batch=2 micro_batch=2 seq_len=2048 {R16} {CKPT}"),
    "mistral-small-24b ckpt 8x512": (1, "mistral-small-24b", f"global_batch=8 micro_batch=8 {R16} {CKPT}"),
    "mistral-small-24b none 2x1024": (
        1,
        "mistral-small-24b",
        f"global_batch=2 micro_batch=2 seq_len=1024 {R16} {NONE}",
    ),
    # Shapes that were not looked at while the terms were chosen.
    "new qwen3-30b-a3b 3x1024": (
        1,
        "qwen3-30b-a3b",
        f"global_batch=3 micro_batch=3 seq_len=1024 {R16} {EXPERTS} {NONE}",
    ),
    "new gpt-oss-20b 3x768": (1, "gpt-oss-20b", f"global_batch=3 micro_batch=3 seq_len=768 lora.r=8 {NONE}"),
    "new olmo2-7b 3x777": (1, "olmo2-7b", f"global_batch=3 micro_batch=3 seq_len=777 lora.r=32 {NONE}"),
    "new gemma3-12b 6x640": (1, "gemma3-12b", f"global_batch=6 micro_batch=6 seq_len=640 lora.r=8 {NONE}"),
    "new phi-4 5x640": (1, "phi-4", f"global_batch=5 micro_batch=5 seq_len=640 lora.r=32 {CKPT}"),
    "new granite-8b 3x1536": (1, "granite-8b", f"global_batch=3 micro_batch=3 seq_len=1536 lora.r=8 {CKPT}"),
    **{
        f"speed18 {model} {micro_batch}x{length}{' ckpt' if checkpointing == CKPT else ''}": (
            1,
            model,
            f"global_batch={micro_batch} micro_batch={micro_batch} seq_len={length} {R16} {checkpointing}",
        )
        for model, micro_batch, length, checkpointing in SPEED_RUNS
    },
    "65b x4 zero2": (4, "llama-65b --placement replicate", f"global_batch=16 micro_batch=4 {CKPT}"),
}


def main() -> None:
    """Run them and print the table and its medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", default="")
    parser.add_argument("--match", default="", help="only runs whose name contains one of these words: WORD,WORD")
    parser.add_argument("--gpus", type=int, help="GPUs of this machine; by default as NVML counts them")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=1, help="runs that share a GPU: to measure memory alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--each", help="a run of one GPU, on every GPU at once: what they reach together at best")
    arguments = parser.parse_args()
    present = arguments.gpus or count_gpus()
    if arguments.each:
        on_each(arguments.each, arguments.steps, present)
        return
    names = [name for name in RUNS if not arguments.only or name in arguments.only.split(",")]
    names = [name for name in names if name not in arguments.skip.split(",")]
    names = [name for name in names if any(word in name for word in arguments.match.split(","))]
    absent = [name for name in names if RUNS[name][0] > present]
    rows = []
    free: Queue[int] = Queue()
    for index in range(present * arguments.at_once):
        free.put(index % present)

    def alone(name: str) -> dict:
        index = free.get()
        try:
            return run(name, arguments.steps, gpu=index)
        finally:
            free.put(index)

    with ThreadPoolExecutor(present * arguments.at_once) as pool:
        for row in pool.map(alone, [name for name in names if RUNS[name][0] == 1]):
            rows.append(row)
            print(line(row), flush=True)
            keep(rows, arguments.out)
    for name in names:
        if 1 < RUNS[name][0] <= present:
            rows.append(run(name, arguments.steps, gpu=None))
            print(line(rows[-1]), flush=True)
    keep(rows, arguments.out)
    report(rows, absent)


def keep(rows: list[dict], folder: Path | None) -> None:
    """Write the rows so far."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "runs.json").write_text(json.dumps(rows, indent=1))


def on_each(name: str, steps: int, present: int) -> None:
    """Print the speed of each GPU with all of them at work, slowest card and all, and their sum."""
    with ThreadPoolExecutor(present) as pool:
        rows = list(pool.map(lambda index: run(name, steps, gpu=index), range(present)))
    for index, row in enumerate(rows):
        print(f"GPU {index}: {row['measured_tok_s']:,.0f} tok/s" if row["rc"] == 0 else line(row))
    if all(row["rc"] == 0 for row in rows):
        speeds = [row["measured_tok_s"] for row in rows]
        print(f"together {sum(speeds):,.0f} tok/s; as fast as the slowest each, {min(speeds) * present:,.0f}")


def count_gpus() -> int:
    """GPUs that NVML shows."""
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetCount())


def run(name: str, steps: int, *, gpu: int | None) -> dict:
    """One `qdist launch`, and what its result says."""
    gpus, flags, settings = RUNS[name]
    folder = Path(tempfile.mkdtemp(prefix="qdist-bench-"))
    command = [sys.executable, "-m", "qdist", "launch", "--gpus", str(gpus), "--model", *flags.split()]
    command += ["--load-format", "dummy", "--run", str(folder / "run")]
    for setting in [*SHAPE.split(), *settings.split(), f"steps={steps}"]:
        command += ["--set", setting]
    # Lessons of earlier runs would flatter later predictions: each run knows the rates of the cards and no more.
    environment = {**os.environ, "QDIST_CACHE": str(folder / "cache")}
    if (cache_dir() / "rates").is_dir():
        shutil.copytree(cache_dir() / "rates", folder / "cache" / "rates")
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    began = time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=LONGEST_S)
        code, said = done.returncode, done.stdout[-1500:] + done.stderr[-2500:]
    except subprocess.TimeoutExpired:
        code, said = 124, f"not finished after {LONGEST_S} s"
    row = {"name": name, "gpus": gpus, "wall_s": time.time() - began, "rc": code}
    if code == 0:
        row |= figures(folder / "run")
    else:
        row["error"] = said
    shutil.rmtree(folder)
    return row


def figures(run_path: Path) -> dict:
    """Of the GPU that was fullest."""
    plan, result = (json.loads((run_path / file).read_text()) for file in ("plan.json", "result.json"))
    pairs = [
        (peak["allocated"] + peak["context"], sum(expected.values()), peak, expected)
        for rank, of_rank in zip(plan["ranks"], result["peaks"], strict=True)
        for peak, expected in zip(of_rank, rank["expected"], strict=True)
    ]
    measured, predicted, peak, expected = max(pairs, key=lambda pair: pair[0])
    speed = result["tokens_per_s"]
    return {
        "placement": plan["placement"], "grid": f"{plan['groups']}x{plan['gpus_per_group']}",
        "schedule": plan["schedule"], "zero": plan["zero_stage"], "micro_batch": plan["micro_batch"],
        "accumulation": plan["gradient_accumulation"], "checkpointed": plan["checkpointed_layers"],
        "optimizer": plan["optimizer"], "predicted": predicted, "measured": measured, "peak": peak,
        "expected": expected, "predicted_tok_s": speed["predicted"], "measured_tok_s": speed["measured"],
        "load_predicted": plan["load_peak_bytes"], "start_s": result["start_seconds"], "loading": result["loading"],
    }  # fmt: skip


def line(row: dict) -> str:
    """A row of the table."""
    if row["rc"]:
        return f"| {row['name']} | failed ({row['rc']}): {row['error'][-500:]} |"
    memory, speed = errors(row)
    return (
        f"| {row['name']} | {row['placement']} {row['grid']} | {row['micro_batch']} x {row['accumulation']} | "
        f"{row['checkpointed']} | {row['predicted'] / GIB:.2f} | {row['measured'] / GIB:.2f} | {memory:+.1f} % | "
        f"{row['predicted_tok_s']:,.0f} | {row['measured_tok_s']:,.0f} | {speed:+.1f} % | "
        f"{row['load_predicted'] / GIB:.1f} / {row['peak']['load'] / GIB:.1f} | {row['start_s']['first_step']:.0f} |"
    )


def errors(row: dict) -> tuple[float, float]:
    """Predicted against measured, in percent: memory, tokens/s."""
    return (
        100 * (row["predicted"] / row["measured"] - 1),
        100 * (row["predicted_tok_s"] / row["measured_tok_s"] - 1),
    )


def report(rows: list[dict], absent: list[str]) -> None:
    """The table, and how far off the predictions were."""
    print()
    print("| run | placement | micro-batch | recomputed | GiB planned | measured | error | tok/s planned | measured | "
          "error | load GiB planned / measured | s to step 1 |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(line(row) if row["rc"] == 0 else f"| {row['name']} | failed |")
    good = [row for row in rows if row["rc"] == 0]
    if good:
        memory, speed = zip(*map(errors, good), strict=True)
        print(f"\n{len(good)} of {len(rows)} runs. Memory: median error {median(map(abs, memory)):.1f} %, worst "
              f"{max(memory, key=abs):+.1f} %. Speed: median error {median(map(abs, speed)):.1f} %, worst "
              f"{max(speed, key=abs):+.1f} %.")  # fmt: skip
    if absent:
        print(f"Left out for want of GPUs: {', '.join(absent)}.")


if __name__ == "__main__":
    main()
