"""Predicted and measured memory of CPU ranks over many kinds of runs, as one Markdown table with a row for each rank.

    python bench/cpu_memory.py [--only "NAME;NAME"] [--out FOLDER] [--base GPTQ] [--chat FILE] [--long FILE] [--list]

Each case is one `qdist launch` of a few steps from seed 0; the resumed ones have a second launch that goes on with the
first. Figures are those of result.json and plan.json. Measured is the peak resident set of a rank until its last step.

The GPTQ base of the cases that have one (it takes minutes and is made once, in FOLDER, unless --base names one):

    qdist quantize smollm2-135m --method gptq --group-size 32 --data alpaca.json --samples 16 --seq-len 256 --out BASE
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

from qdist.core.telemetry.memory_report import MEANING, error, shown_error

MIB = 2**20
USUAL = "seed=0 train.eval_steps=0 train.answers=0 train.held_out=0.02 steps=3"
SMALL, LONG = "--model smollm2-135m --data demo", "--model smollm2-135m --data LONG"
GPTQ, LONG_GPTQ = "--model BASE --data demo --method", "--model BASE --data LONG --method"
CHECKPOINTS = "train.checkpointing=true"
SPLIT, SHARD = "--gpus 2 --placement split", "--gpus 2 --gpus-per-group 2 --placement shard"


class Case(NamedTuple):
    """Flags and settings of a launch. resumed: ranks of a second launch, from step 2 on."""

    flags: str
    settings: str = ""
    resumed: int = 0


CASES = {
    "1 rank": Case(SMALL),
    "1 rank, micro-batch 1": Case(SMALL, "micro_batch=1"),
    "1 rank, micro-batch 16": Case(SMALL, "micro_batch=16 global_batch=16"),
    "1 rank, recomputed": Case(SMALL, CHECKPOINTS),
    "1 rank, 4 x 128": Case("--model smollm2-135m --data CHAT", "seq_len=128 micro_batch=4 global_batch=4"),
    "1 rank, 4 x 256": Case(LONG, "seq_len=256 micro_batch=4 global_batch=4"),
    "2 ranks": Case(f"{SMALL} --gpus 2"),
    "2 ranks, ZeRO-1": Case(f"{SMALL} --gpus 2", "zero.stage=1"),
    "2 ranks, ZeRO-3": Case(f"{SMALL} --gpus 2", "zero.stage=3"),
    "shard": Case(f"{SMALL} {SHARD}"),
    "split": Case(f"{SMALL} {SPLIT}"),
    "split, 1 x 256": Case(f"{LONG} {SPLIT}", "seq_len=256 micro_batch=1 global_batch=4"),
    "8 bits": Case(f"{SMALL} --bits 8"),
    "16 bits": Case(f"{SMALL} --bits 16"),
    "GPTQ-LoRA": Case(f"{GPTQ} gptq-lora"),
    "QA-LoRA": Case(f"{GPTQ} qa-lora"),
    "QA-LoRA, 2 ranks": Case(f"{GPTQ} qa-lora --gpus 2"),
    "QA-LoRA, 4 x 48, 2 micro-batches": Case(f"{GPTQ} qa-lora", "micro_batch=4"),
    "1 rank, 2 x 256, 2 micro-batches": Case(LONG, "seq_len=256 micro_batch=2 global_batch=4"),
    "QA-LoRA, 2 x 256": Case(f"{LONG_GPTQ} qa-lora", "seq_len=256 micro_batch=2 global_batch=2"),
    "QA-LoRA, 2 x 256, 2 micro-batches": Case(f"{LONG_GPTQ} qa-lora", "seq_len=256 micro_batch=2 global_batch=4"),
    "GPTQ-LoRA, 2 x 256, 2 micro-batches": Case(f"{LONG_GPTQ} gptq-lora", "seq_len=256 micro_batch=2 global_batch=4"),
    "resumed, 2 on 1": Case(f"{SMALL} --gpus 2", resumed=1),
    "resumed split, 2 on 2": Case(f"{SMALL} {SPLIT}", resumed=2),
    "r=8, micro-batch 4": Case(SMALL, "lora.r=8 micro_batch=4"),
    "8 bits, 2 ranks, micro-batch 2": Case(f"{SMALL} --bits 8 --gpus 2", "micro_batch=2"),
    "0.5B, random, 2 x 128": Case(
        "--model qwen2.5-0.5b --load-format dummy", "seq_len=128 micro_batch=2 global_batch=2 steps=2"
    ),
}
"""What the constants of `core/planning/process_memory.py` were taken from."""
UNSEEN = {
    "shard, recomputed, 2 x 512": Case(f"{LONG} {SHARD}", f"seq_len=512 micro_batch=2 global_batch=4 {CHECKPOINTS}"),
    "resumed, 1 on 2": Case(SMALL, resumed=2),
    "resumed, 1 on 1": Case(SMALL, resumed=1),
    "resumed, 2 on 2": Case(f"{SMALL} --gpus 2", resumed=2),
    "2 ranks, ZeRO-2": Case(f"{SMALL} --gpus 2", "zero.stage=2"),
    "1 rank, 1 x 1024": Case(LONG, "seq_len=1024 micro_batch=1 global_batch=2"),
    "1 rank, 4 x 512 recomputed": Case(LONG, f"seq_len=512 micro_batch=4 global_batch=4 {CHECKPOINTS}"),
}
"""What they were not."""


class Row(NamedTuple):
    """One rank."""

    case: str
    rank: int
    predicted: int
    measured: int


def launch(arguments: list[str], log: Path) -> None:
    """One launch, its words in a log. Raises CalledProcessError where it fails."""
    with open(log, "a") as file:
        subprocess.run([sys.executable, "-m", "qdist", "launch", *arguments], stdout=file, stderr=file, check=True)


def run(name: str, case: Case, folder: Path, names: dict[str, str]) -> list[Row]:
    """Launch a case, and what it took, rank by rank."""
    stem = "".join(char if char.isalnum() else "-" for char in name)
    place, log = folder / f"{stem}.run", folder / f"{stem}.log"
    flags = [names.get(word, word) for word in shlex.split(case.flags)]
    settings = [f"--set={setting}" for setting in f"{USUAL} {case.settings}".split()]
    if "--gpus" not in flags:
        flags += ["--gpus", "1"]
    if not (place / "plan.json").exists():
        again = ["--set=steps=4", "--set=train.save_steps=2"] if case.resumed else []
        launch([*flags, *settings, *again, "--run", str(place)], log)
        if case.resumed:
            forget(place, step=4)
            launch(["--resume", "--run", str(place), "--gpus", str(case.resumed)], log)
    plan, result = (json.loads((place / file).read_text()) for file in ("plan.json", "result.json"))
    return [
        Row(name, rank["rank"], sum(rank["expected"][0].values()), peaks[0]["allocated"] + peaks[0]["context"])
        for rank, peaks in zip(plan["ranks"], result["peaks"], strict=True)
    ]


def forget(place: Path, *, step: int) -> None:
    """Take away what a run wrote at its end, as if it had been killed before."""
    (place / "result.json").unlink()
    shutil.rmtree(place / "adapter")
    shutil.rmtree(next((place / "checkpoints").glob(f"step_*{step}")))


def report(rows: list[Row]) -> None:
    """The table, and how many ranks are within 5 %."""
    print("| run | rank | MiB predicted | measured | error |\n|---|---|---|---|---|")
    for row in rows:
        shown = shown_error(row.predicted, row.measured)
        print(f"| {row.case} | {row.rank} | {row.predicted / MIB:,.0f} | {row.measured / MIB:,.0f} | {shown} |")
    errors = [abs(error(row.predicted, row.measured) or 0.0) for row in rows]
    within = sum(value <= 0.05 for value in errors)
    print(f"\n{within} of {len(rows)} ranks within 5 %, median {100 * median(errors):.1f} %; {MEANING}.")


def main() -> None:
    """Run what was asked for, one case after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names, separated by semicolons")
    parser.add_argument("--out", type=Path, default=Path("cpu-memory"))
    parser.add_argument("--base", help="a GPTQ checkpoint with groups of 32")
    parser.add_argument("--chat", help="short conversations; 500 of ShareGPT's", default="sharegpt.json")
    parser.add_argument("--long", help="long ones; 600 of OpenAssistant's", default="oasst.jsonl")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    everything = CASES | UNSEEN
    wanted = given.only.split(";") if given.only else list(everything)
    if given.list:
        print("\n".join(everything))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    names = {"BASE": given.base or str(given.out / "gptq"), "CHAT": given.chat, "LONG": given.long}
    rows: list[Row] = []
    for name in wanted:
        try:
            rows += run(name, everything[name], given.out, names)
        except subprocess.CalledProcessError as failed:
            print(f"{name}: exit code {failed.returncode}, see its log in {given.out}", file=sys.stderr)
    report(rows)


if __name__ == "__main__":
    main()
