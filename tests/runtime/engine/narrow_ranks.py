"""A rank that adds numbers up with others in 16 bits, and writes what it got; arguments: a folder, ranks of nodes."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from qdist.runtime.engine.reduction import NarrowSum

COUNT, STEPS = 1001, 40
SCALES = (1.0, 1.0, 1024.0, 512.0)
"""Factors on all numbers of a step, one after the other."""


def numbers_of(rank: int, step: int) -> torch.Tensor:
    """A rank's own numbers of a step."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(COUNT, generator=generator) * 10.0 ** -(step % 4)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    narrow = NarrowSum(COUNT, torch.device("cpu"), nodes=[int(each) for each in sys.argv[2:]])
    got = []
    for step in range(STEPS):
        scale = SCALES[step % len(SCALES)]
        numbers = numbers_of(rank, step) * scale
        narrow.add_up(numbers, scale=scale)
        got.append(numbers / scale)
    narrow.add_up(torch.full((COUNT,), float("inf")), scale=1.0)
    narrow.forget()
    after = torch.ones(COUNT)
    narrow.add_up(after, scale=1.0)
    torch.save((torch.stack(got), after), Path(sys.argv[1]) / f"{rank}.pt")
    dist.destroy_process_group()
