"""Bins hold every sample once, are nearly as few as can be, and give every rank as many with like work."""

import random
from itertools import pairwise

import pytest

from qdist.runtime.data.bins import BinSize, attention_work, bin_size, cut, deal, pack

DRAWN = random.Random(0)
CASES = [
    ([5, 4, 3, 3, 2, 2, 1], BinSize(10, 8), 2),
    ([10, 10, 10], BinSize(10, 8), 3),
    ([6, 6, 6, 4, 4, 4], BinSize(10, 8), 3),
    ([1] * 9, BinSize(10, 4), 3),
    ([], BinSize(10, 4), 0),
    ([10], BinSize(10, 4), 1),
]
"""Lengths, the size of a bin, and the fewest bins."""


@pytest.mark.parametrize(("lengths", "size", "fewest"), CASES)
def test_every_sample_is_in_one_bin_and_none_is_over_full(lengths: list[int], size: BinSize, fewest: int) -> None:
    bins = pack(lengths, size)
    assert len(bins) == fewest
    assert sorted(place for own in bins for place in own) == list(range(len(lengths)))
    for own in bins:
        assert sum(lengths[place] for place in own) <= size.positions
        assert len(own) <= size.samples


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("lengths", "size", "fewest"), CASES)
def test_every_rank_has_as_many_bins(lengths: list[int], size: BinSize, fewest: int, ranks: int) -> None:
    bins = deal(lengths, size, ranks=ranks)
    assert len(bins) == ranks * max(1, -(-fewest // ranks))
    assert sorted(place for own in bins for place in own) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in own) <= size.positions for own in bins)
    assert len(deal(lengths, size, ranks=ranks, least=4)) == ranks * max(4, -(-fewest // ranks))


def test_random_samples_fill_bins_to_the_last_few_percent() -> None:
    lengths = [min(512, int(DRAWN.lognormvariate(5, 0.8)) + 5) for _ in range(256)]
    assert len(pack(lengths, BinSize(2048, 64))) <= 1.05 * sum(lengths) / 2048 + 1


def test_ranks_have_like_work_in_a_step_and_in_each_micro_batch() -> None:
    lengths = [min(512, int(DRAWN.lognormvariate(5, 0.8)) + 5) for _ in range(256)]
    size, ranks = BinSize(2048, 64), 4
    bins = deal(lengths, size, ranks=ranks)
    works = [sum(attention_work(lengths, own) for own in bins[rank::ranks]) for rank in range(ranks)]
    unsorted = pack(lengths, size)
    before = [sum(attention_work(lengths, own) for own in unsorted[rank::ranks]) for rank in range(ranks)]
    assert max(works) / min(works) < min(1.1, max(before) / min(before))
    ordered = [attention_work(lengths, own) for own in bins]
    rounds = [ordered[start : start + ranks] for start in range(0, len(ordered), ranks)]
    assert all(min(one) >= max(next_one) for one, next_one in pairwise(rounds))


def test_a_data_set_with_short_samples_does_not_have_bins_with_thousands_of_them() -> None:
    assert bin_size(micro_batch=4, seq_len=512, mean_length=128.0) == BinSize(2048, 32)
    assert bin_size(micro_batch=1, seq_len=16, mean_length=16.0) == BinSize(16, 8)


def test_unpacked_samples_are_cut_in_order() -> None:
    assert cut([4, 2, 9, 7, 1], 2) == [[4, 2], [9, 7], [1]]
