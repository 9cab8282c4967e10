"""The adapter of 1, 2 and 4 CPU ranks at the same global batch: how far apart?

    python bench/ranks.py [--steps 8]

SmolLM2-135M, NF4, the demo's data, dropout on. Prints the largest difference of any value, and of any matrix relative
to its norm.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from qdist.runtime.train.checkpoint import load_tensors

SETTINGS = ["micro_batch=2", "lora.dropout=0.1", "train.answers=0", "train.eval_steps=0", "train.held_out=0.02"]


def main() -> None:
    """Three runs, two comparisons."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="qdist-ranks-"))
    adapters = {}
    for ranks in (1, 2, 4):
        run = folder / str(ranks)
        command = [sys.executable, "-m", "qdist", "launch", "--gpus", str(ranks), "--data", "demo", "--run", str(run)]
        for setting in [*SETTINGS, f"steps={arguments.steps}"]:
            command += ["--set", setting]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        adapters[ranks] = load_tensors(run / "adapter" / "adapter_model.safetensors")
    for ranks in (2, 4):
        pairs = [(adapters[1][name], adapters[ranks][name]) for name in adapters[1]]
        largest = max(float((one - many).abs().max()) for one, many in pairs)
        relative = max(float((one - many).norm() / one.norm()) for one, many in pairs)
        print(json.dumps({"ranks": ranks, "steps": arguments.steps, "largest": largest, "largest_relative": relative}))


if __name__ == "__main__":
    main()
