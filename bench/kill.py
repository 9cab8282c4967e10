"""kill -9 at random moments, then --resume: are the losses those of the run that was never killed?

    python bench/kill.py [--times 20] [--ranks 2] [--seed 0]

A tiny random Llama on CPU ranks, dropout on, a checkpoint every 5 steps. What is killed is drawn too: the launcher,
torch.distributed.run, one rank, or all of them at once. Losses and the adapter's bytes must be equal, not close.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qdist.core.events import decode_lines, losses
from qdist.host.rundir import RunDir

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512,
}  # fmt: skip
SETTINGS = ["steps=250", "global_batch=4", "micro_batch=1", "seq_len=32", "optim.lr=1e-2", "lora.r=8",
            "lora.dropout=0.1", "train.save_steps=5", "train.eval_steps=50"]  # fmt: skip


def main() -> None:
    """One run to its end, then `times` runs killed once each at a random moment and resumed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--ranks", default="2")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="qdist-kill-"))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    draw = random.Random(arguments.seed)
    began = time.monotonic()
    whole = folder / "whole"
    finish(subprocess.Popen(launch(folder, whole, arguments.ranks), stdout=subprocess.DEVNULL))
    length = time.monotonic() - began
    wanted, same = outcome(whole), 0
    print(f"never killed: {length:.0f} s, {len(wanted[0])} losses, adapter {wanted[1][:12]}", flush=True)
    number = 0
    while number < arguments.times:
        run = folder / f"killed{number:02d}-{draw.randrange(10**6):06d}"
        process = subprocess.Popen(
            launch(folder, run, arguments.ranks), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(draw.uniform(0.25, 1.0) * length)
        if process.poll() is not None:
            continue  # it had ended: nothing to kill
        victim = draw.choice(("launcher", "agent", "one rank", "everything"))
        step = newest_step(run)
        killed = kill(run, process, victim, draw)
        process.wait()
        left = wait_for_none(run)
        if RunDir(run).result() is None:
            command = [sys.executable, "-m", "qdist", "launch", "--resume", "--run", str(run)]
            command = command if RunDir(run).exists() else launch(folder, run, arguments.ranks)
            finish(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        equal = outcome(run) == wanted
        same += equal
        number += 1
        verdict = "identical" if equal else "DIFFERENT"
        print(f"{number:2}  {victim:10} {killed} killed at step {step:3}  left {left}  {verdict}", flush=True)
    print(json.dumps({"times": arguments.times, "identical": same, "ranks": arguments.ranks, "seed": arguments.seed}))
    raise SystemExit(same != arguments.times)


def launch(folder: Path, run: Path, ranks: str) -> list[str]:
    """The command of a run."""
    command = [sys.executable, "-m", "qdist", "launch", "--gpus", ranks, "--model", str(folder / "model")]
    command += ["--load-format", "dummy", "--run", str(run)]
    for setting in SETTINGS:
        command += ["--set", setting]
    return command


def finish(process: subprocess.Popen) -> None:
    """Wait for a run that must end well."""
    if process.wait():
        raise SystemExit(f"{process.args} ended with {process.returncode}")


def outcome(run: Path) -> tuple[dict[int, float], str]:
    """Losses by step, and the adapter's SHA-256."""
    events = decode_lines(RunDir(run).event_file(0).read_bytes())
    return losses(events), hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def newest_step(run: Path) -> int:
    """The last step that rank 0 reported."""
    path = RunDir(run).event_file(0)
    events = decode_lines(path.read_bytes()) if path.exists() else []
    return max((event.step for event in events), default=0)


def processes(run: Path) -> dict[int, str]:
    """Pids of torch.distributed.run and the ranks of this run, by what they are."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(run) in command and "qdist.runtime.worker" in command:
                found[int(entry.name)] = "agent" if "torch.distributed.run" in command else "rank"
    return found


def kill(run: Path, launcher: subprocess.Popen, victim: str, draw: random.Random) -> int:
    """SIGKILL to the victims; how many there were."""
    found = processes(run)
    ranks = sorted(pid for pid, what in found.items() if what == "rank")
    pids = {
        "launcher": [launcher.pid],
        "agent": [pid for pid, what in found.items() if what == "agent"],
        "one rank": [draw.choice(ranks)] if ranks else [launcher.pid],
        "everything": [launcher.pid, *found],
    }[victim] or [launcher.pid]
    for pid in pids:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    return len(pids)


def wait_for_none(run: Path, seconds: float = 40) -> int:
    """How many processes of the run are left after a while."""
    until = time.monotonic() + seconds
    while processes(run) and time.monotonic() < until:
        time.sleep(0.2)
    return len(processes(run))


if __name__ == "__main__":
    main()
