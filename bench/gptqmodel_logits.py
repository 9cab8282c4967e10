"""Logits of GPTQ checkpoints in GPTQModel beside those in qdist, both on the CPU.

    python bench/gptqmodel_logits.py --save logits.safetensors CHECKPOINT...       # where gptqmodel is installed
    python bench/gptqmodel_logits.py --compare logits.safetensors CHECKPOINT...    # where qdist is

GPTQModel has its own wishes for torch, hence two environments. Its pure torch kernel is asked, in float16. Checkpoints
are named the same way both times. The second command ends with 1 where logits differ by more than 3e-3 of their norm.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BAR = 3e-3


def main() -> None:
    """Write GPTQModel's logits, or compare ours with them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints", nargs="+", type=Path)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--save", type=Path)
    task.add_argument("--compare", type=Path)
    given = parser.parse_args()
    if given.save:
        save_file({str(path): theirs(path) for path in given.checkpoints}, given.save)
        return
    saved, norms = load_file(given.compare), list[float]()
    for path in given.checkpoints:
        expected, found = saved[str(path)].double(), ours(path).double()
        norms.append(((found - expected).norm() / expected.norm()).item())
        largest = ((found - expected).abs().max() / expected.abs().max()).item()
        same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
        print(f"{path.name:24}  norm {norms[-1]:.1e}  largest {largest:.1e}  same token {same:.0%}")
    print(json.dumps({"checkpoints": len(norms), "largest_norm": max(norms)}))
    sys.exit(not all(norm <= BAR for norm in norms))


def theirs(path: Path) -> torch.Tensor:
    """What GPTQModel answers."""
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(str(path), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    return logits(loaded.model, path)


def ours(path: Path) -> torch.Tensor:
    """What qdist answers."""
    import qdist

    return logits(qdist.load(path, dtype="float16", device="cpu")[0], path)


def logits(model: Any, path: Path) -> torch.Tensor:
    """Over two rows of tokens, the same everywhere."""
    vocabulary = json.loads((path / "config.json").read_text())["vocab_size"]
    ids = torch.randint(vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found.contiguous()


if __name__ == "__main__":
    main()
