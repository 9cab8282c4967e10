"""How much faster do two GPUs score a text than one? `python -m bench.evaluate_gpus [--tiny]`.

A llama of random weights in bfloat16 (16 layers of 2,048) scores windows of 1,024 tokens through `qdist evaluate`.
Prints the seconds of the scoring alone, those of the whole command, and the perplexities. --tiny: on one and two CPU
processes.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.copies import WIDE
from tests.runtime.tiny import save_model


def main() -> None:
    """Write a model and a text, score it with one GPU and with two, print."""
    tiny = "--tiny" in sys.argv
    window, words = (64, 400) if tiny else (1024, 400_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", **({} if tiny else WIDE))
        (folder / "t.txt").write_text(" ".join(f"hello there {number % 97}" for number in range(words)))
        alone = [scored(folder, count, window) for count in (1, 2)]
    print(f"two against one: {alone[0] / alone[1]:.2f} times as fast")


def scored(folder: Path, count: int, window: int) -> float:
    """Seconds in which so many GPUs score the text."""
    command = [sys.executable, "-m", "qdist", "evaluate", str(folder / "model"), "--gpus", str(count), "--json"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--tasks", f"perplexity:{folder / 't.txt'}", "--window", str(window)],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    result = json.loads(done.stdout[done.stdout.index("{") :])["evaluations"][0]["results"][0]
    (figure,), seconds = result["figures"], float(result["seconds"])
    print(
        f"{count}: {result['settings']['windows']:,} windows in {seconds:.1f} s, {time.monotonic() - began:.0f} s in "
        f"all, perplexity {figure['value']:.6f}",
        flush=True,
    )
    return seconds


if __name__ == "__main__":
    main()
