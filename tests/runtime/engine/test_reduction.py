"""Sums in 16 bits: the same on all ranks, near the exact ones at once, and nearer the longer they are added up."""

from pathlib import Path

import pytest
import torch

from tests.runtime.conftest import ForkRanks
from tests.runtime.engine.narrow_ranks import COUNT, STEPS, numbers_of


@pytest.mark.parametrize("nodes", [(2,), (3,), (1, 1), (2, 1), (2, 2)])
def test_sums_in_16_bits_lose_nothing_over_the_steps(
    fork_ranks: ForkRanks, tmp_path: Path, nodes: tuple[int, ...]
) -> None:
    ranks = sum(nodes)
    assert not any(fork_ranks("tests.runtime.engine.narrow_ranks", ranks, tmp_path, *nodes))
    got = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    assert all(torch.equal(got[0][0], sums) for sums, _ in got[1:])
    exact = sum(numbers_of(rank, step) for rank in range(ranks) for step in range(STEPS))
    one_rounding = 2.0**-9 * 5 * ranks  # of numbers below 5, on every rank; and then once more of their sums
    assert (got[0][0].sum(0) - exact).abs().max() < 2 * one_rounding
    plain = sum(
        sum(numbers_of(rank, step).bfloat16().float() for rank in range(ranks)).bfloat16().float()
        for step in range(STEPS)
    )
    assert (got[0][0].sum(0) - exact).norm() < (plain - exact).norm() / 3
    assert torch.equal(got[0][1], torch.full((COUNT,), float(ranks))), "what was left of a skipped step came back"
