"""Tokens/s and peak memory of `qdist launch` on this machine's GPUs, case by case, beside the stock stack's.

    python bench/throughput.py [--cases 7b,7b-none,...] [--steps 12] [--out FILE]

Random weights in Llama shapes, random tokens, nothing to download. The last lines are the table.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SHAPE = ["seq_len=512", "train.held_out=0.0", "train.save_steps=1000"]
CASES = {
    "7b": ("llama-7b", 1, ["global_batch=16", "micro_batch=16", "train.checkpointing=true"]),
    "7b-none": ("llama-7b", 1, ["global_batch=16", "micro_batch=16", "train.checkpointing=false"]),
    "7b-plain": ("llama-7b", 1, ["global_batch=16", "micro_batch=16", "train.checkpointing=true", "liger=false"]),
    "7b-int8": ("llama-7b --bits 8", 1, ["global_batch=16", "micro_batch=16", "train.checkpointing=true"]),
    "7b-16bit": ("llama-7b --bits 16", 1, ["global_batch=16", "micro_batch=16", "train.checkpointing=true"]),
    "7b-fp16": ("llama-7b", 1, ["global_batch=16", "micro_batch=16", "train.checkpointing=true", "dtype=float16"]),
    "7b-2": ("llama-7b", 2, ["global_batch=32", "micro_batch=16", "train.checkpointing=true"]),
    "7b-2-none": ("llama-7b", 2, ["global_batch=32", "micro_batch=16", "train.checkpointing=false"]),
    "7b-2-offload": (
        "llama-7b",
        2,
        ["global_batch=32", "micro_batch=16", "train.checkpointing=true", "zero.offload=cpu"],
    ),
    "7b-2-z3": ("llama-7b", 2, ["global_batch=32", "micro_batch=16", "train.checkpointing=true", "zero.stage=3"]),
    "65b-48": ("llama-65b --max-memory 48GiB", 1, ["global_batch=4", "micro_batch=4", "train.checkpointing=true"]),
}


def main() -> None:
    """Run the cases one after the other and print their table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--stock", action="store_true", help="also time transformers + peft + bitsandbytes")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.cases.split(","):
        rows.append(run(name, *CASES[name], steps=arguments.steps))
        print(rows[-1], flush=True)
    if arguments.stock:
        for checkpointing in (True, False):
            rows.append(stock(checkpointing))
            print(rows[-1], flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))
    print(f"{'case':16} {'tok/s':>8} {'peak GiB':>9} {'planned':>8} {'allocated':>9}  {'start s':>7}")
    for row in rows:
        figures = (row["peak"], row["planned"], row["allocated"])
        print(
            f"{row['case']:16} {row['tok_s']:8,.0f}" + "".join(f"{x:10.2f}" for x in figures) + f"{row['start_s']:9.1f}"
        )


def run(case: str, model: str, gpus: int, settings: list[str], *, steps: int) -> dict:
    """One `qdist launch`; figures from its events."""
    folder = Path(tempfile.mkdtemp(prefix="qdist-bench-")) / case
    command = [
        sys.executable,
        "-m",
        "qdist",
        "launch",
        "--gpus",
        str(gpus),
        "--model",
        *model.split(),
        "--load-format",
        "dummy",
    ]
    for setting in [*SHAPE, *settings, f"steps={steps}"]:
        command += ["--set", setting]
    began = time.time()
    done = subprocess.run([*command, "--run", str(folder)], capture_output=True, text=True, check=False)
    row = {
        "case": case,
        "tok_s": 0.0,
        "peak": 0.0,
        "planned": 0.0,
        "allocated": 0.0,
        "start_s": 0.0,
        "rc": done.returncode,
    }
    if done.returncode:
        print(done.stdout[-1500:], done.stderr[-3000:])
        for log in sorted((folder / "logs").glob("rank*.log")):
            print(log.name, log.read_text()[-2500:])
        return row
    events = [json.loads(line) for line in (folder / "events/rank000.jsonl").read_text().splitlines()]
    steps_seen = [event for event in events if event["kind"] == "step"]
    plan = json.loads((folder / "plan.json").read_text())
    expected = plan["ranks"][0]["expected"][0]
    row["tok_s"] = median(event["tokens"] / event["seconds"] for event in steps_seen[3:])
    row["peak"] = max(event.get("memory_bytes", 0) for event in events) / 2**30
    row["planned"] = sum(expected.values()) / 2**30
    parts = json.loads((folder / "result.json").read_text())["peak_bytes"]
    row["allocated"] = parts["allocated"] / 2**30
    row["context"] = parts["context"] / 2**30
    row["start_s"] = steps_seen[0]["time"] - began
    row["loss"] = [round(steps_seen[0]["loss"], 3), round(steps_seen[-1]["loss"], 3)]
    shutil.rmtree(folder.parent)
    return row


def stock(checkpointing: bool) -> dict:
    """The plain loop of transformers, peft and bitsandbytes on the same shape, in a process of its own."""
    script = Path(__file__).with_name("stock.py")
    done = subprocess.run(
        [sys.executable, str(script), str(int(checkpointing))],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    if done.returncode:
        print(done.stderr[-2000:])
        return {"case": "stock", "tok_s": 0.0, "peak": 0.0, "planned": 0.0, "allocated": 0.0, "start_s": 0.0}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
