"""Useful tokens/s of real lengths, packed and padded, on one GPU: random weights and tokens, no model to download.

    python bench/packed_speed.py LENGTHS [--model llama-7b] [--seq-len 2048] [--steps 6]

LENGTHS: a JSON list of numbers of tokens, and of those with a loss: [[310, 120], ...].
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import msgspec
import torch

import qdist
from qdist.runtime.data.tokenized import IGNORED, Summary, TokenizedSet

WAYS = (("padded", 4), ("padded", 2), ("packed", 1), ("packed", 2), ("packed", 4))


def main() -> None:
    """Time each way and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("lengths", type=Path)
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", default="", help="padded or packed; both by default")
    arguments = parser.parse_args()
    tokens = tokens_of(json.loads(arguments.lengths.read_text()), arguments.seq_len)
    for way, size in WAYS:
        if arguments.only not in ("", way):
            continue
        print(timed(arguments, tokens, way, size), flush=True)


def tokens_of(lengths: list[list[int]], longest: int) -> TokenizedSet:
    """Random samples of these lengths, the last tokens of each with a loss."""
    cut = [(min(length, longest), min(learned, length, longest)) for length, learned in lengths]
    total = sum(length for length, _ in cut)
    ids = torch.randint(3, 1000, (total,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    labels, start, offsets = torch.full_like(ids, IGNORED), 0, [0]
    for length, learned in cut:
        labels[start + length - learned : start + length] = ids[start + length - learned : start + length]
        start += length
        offsets.append(start)
    summary = Summary(records=len(cut), dropped=0, truncated=0, tokens=total, learned_tokens=sum(n for _, n in cut))
    return TokenizedSet(ids, labels, torch.tensor(offsets), summary)


def timed(arguments, tokens: TokenizedSet, way: str, size: int) -> str:
    """A row: useful tokens/s of the median step."""
    from qdist.runtime.data.batches import Samples
    from qdist.runtime.engine.torch import MicroBatch
    from qdist.runtime.placements.registry import placement_of
    from qdist.runtime.train import setup

    plan = qdist.plan(
        model=arguments.model, load_format="dummy", gpus=1, steps=4, seq_len=arguments.seq_len, micro_batch=size,
        global_batch=16, **{"train.held_out": 0.0, "train.checkpointing": False, "optim.name": "adamw"},
    )  # fmt: skip
    plan = msgspec.structs.replace(plan, packed=way == "packed")
    place = placement_of(plan, 0, (torch.device("cuda", 0),))
    setup.read_samples = lambda plan, *, pad_id: Samples(plan, tokens, pad_id=pad_id)
    built = setup.assemble(place, None, setup.load_part(place).backbone, pad_id=0)
    engine, samples, speeds, counts = built.engine, built.forward.samples, [], []
    engine.replayed.start()
    for step in range(arguments.steps + 3):
        batches = samples.step(step)
        torch.cuda.synchronize()
        began = time.perf_counter()
        own = [MicroBatch(lambda chosen=chosen: samples.batch(chosen), step) for chosen in batches]
        engine.accumulate(own, weight=1e-4, loss_scale=1.0)
        engine.step(1e-4, 1.0)
        useful = sum(map(samples.tokens, batches))
        speeds.append(useful / (time.perf_counter() - began))
        counts.append((len(batches), useful / (useful + sum(map(samples.padding, batches)))))
    rows, share = (sum(column) / len(counts) for column in zip(*counts, strict=True))
    return (
        f"{way} {size} x {arguments.seq_len}: {median(speeds[3:]):9,.0f} useful tok/s, {rows:.1f} micro-batches a "
        "step, "
        f"{100 * share:.0f} % of positions hold tokens {engine.replayed.refused}"
    )


if __name__ == "__main__":
    main()
