"""How much faster do copies of a model on two GPUs answer 512 prompts than one? `python -m bench.copies [--tiny]`.

A llama of random weights in bfloat16 (16 layers of 2,048) answers prompts of about 64 tokens with 128 each, 32 at a
time on each GPU, through `qdist generate`. Prints that, and whether both files are the same. --tiny: on a CPU.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.runtime.tiny import save_model

WIDE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "max_position_embeddings": 1024, "initializer_range": 0.02, "dtype": torch.bfloat16,
}  # fmt: skip


def answered(folder: Path, gpus: int | None, most: int) -> bytes:
    """The file that copies on so many GPUs write."""
    out = folder / f"{gpus}.jsonl"
    words = ["--prompts", str(folder / "p.txt"), "--out", str(out), "--batch", "32", "--max-new-tokens", str(most)]
    words += ["--gpus", str(gpus)] if gpus else []
    done = subprocess.run(
        [sys.executable, "-m", "qdist", "generate", str(folder / "model"), *words],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    print(f"{gpus or 'no'} GPUs: {done.stdout.strip()}", flush=True)
    return out.read_bytes()


def main() -> None:
    """Write a model and prompts, answer them, print."""
    tiny = "--tiny" in sys.argv
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", **({} if tiny else WIDE))
        count, words = (8, 2) if tiny else (512, 24)
        prompts = [" ".join(["hello there"] * (words + number % 9)) + f" {number}" for number in range(count)]
        (folder / "p.txt").write_text("\n".join(prompts) + "\n")
        files = [answered(folder, gpus, 8 if tiny else 128) for gpus in ((None,) if tiny else (1, 2))]
    print(f"the same answers: {len(set(files)) == 1}")


if __name__ == "__main__":
    main()
