"""How long a very long run takes to look at: `python bench/million.py [--lines 1000000]`.

Writes the run directory of a finished run of two ranks whose event logs have so many lines in all, and times
`qdist monitor --once`, `qdist report` and `qdist runs` on it, each as a command of its own.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from qdist.core.spec.run_spec import resolve
from qdist.core.telemetry.events import Event, encode
from qdist.core.text import format_bytes
from qdist.host.launch import claim, prepare
from qdist.host.run.rundir import RunDir


def main() -> None:
    """Print the size of the logs, and the best and the worst of three times of each command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", type=int, default=1_000_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qdist-million-") as name:
        run = RunDir(Path(name, "runs/long"))
        claim.write(job(run))
        write(run, given.lines // 2)
        size = sum(file.stat().st_size for file in run.events.iterdir())
        print(f"{given.lines:,} lines, {format_bytes(size)}")
        for command in (("monitor", str(run.path), "--once"), ("report", str(run.path)), ("runs",)):
            times = []
            for _ in range(3):
                began = time.monotonic()
                subprocess.run(
                    [sys.executable, "-m", "qdist", *command], check=True, cwd=name, stdout=subprocess.DEVNULL
                )
                times.append(time.monotonic() - began)
            print(f"qdist {command[0]}: {min(times):.2f} to {max(times):.2f} s")
        print(f"report.html: {format_bytes((run.path / 'report.html').stat().st_size)}")


def job(run: RunDir) -> prepare.Launch:
    """A plan for a model that is not there."""
    config = Path(run.path.parent.parent, "model", "config.json")
    config.parent.mkdir(parents=True)
    shape = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "vocab_size": 128, "num_attention_heads": 4, "max_position_embeddings": 512}  # fmt: skip
    config.write_text(json.dumps(shape))
    settings = {"model": str(config.parent), "load_format": "dummy", "gpus": 2, "run": str(run.path), "steps": 10}
    return prepare.prepare(resolve(settings))


def write(run: RunDir, steps: int) -> None:
    """Noise around a falling loss, an evaluation and a checkpoint now and then."""
    draw = random.Random(0)
    for rank in (0, 1):
        with open(run.event_file(rank), "wb") as file:
            for step in range(1, steps + 1):
                one = Event(
                    kind="step", step=step, total_steps=steps, rank=rank, time=1.7e9 + step, seconds=1.0,
                    loss=1 + 2 * math.exp(-step / 1e5) + draw.gauss(0, 0.05), learning_rate=2e-4,
                    gradient_norm=abs(draw.gauss(0.3, 0.05)), tokens=4000 + draw.randrange(96), padding=40,
                    own_tokens=2000, data_s=0.001, busy_s=0.9, update_s=0.02, memory_bytes=1 << 30,
                )  # fmt: skip
                file.write(encode(one))
                if step % 5000 == 0 and rank == 0:
                    file.write(encode(msgspec.structs.replace(one, kind="eval", held_out_loss=one.loss)))
                    file.write(encode(Event(kind="checkpoint", step=step, time=one.time)))


if __name__ == "__main__":
    main()
