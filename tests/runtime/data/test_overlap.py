"""Training samples that are evaluated on too are found by their tokens."""

import torch

from qdist.core.planning.plan import Part
from qdist.runtime.data.overlap import common, overlap_note
from qdist.runtime.data.tokenized import Summary, TokenizedSet


def tokenized(*samples: list[int]) -> TokenizedSet:
    tokens = torch.tensor([token for sample in samples for token in sample], dtype=torch.int32)
    lengths = torch.tensor([0, *map(len, samples)])
    summary = Summary(records=len(samples), dropped=0, truncated=0, tokens=len(tokens), learned_tokens=0)
    return TokenizedSet(tokens, tokens.clone(), lengths.cumsum(0), summary)


LONG = list(range(50))
ALMOST = [*LONG[:22], 99, *LONG[23:]]
"""Differs between the tokens that are looked at first."""


def test_samples_of_equal_tokens_are_found_whole() -> None:
    found = tokenized([1], LONG, [1, 2], ALMOST, LONG, [3, 2], LONG, [1, 2], [4])
    assert common(found, torch.arange(6), torch.arange(6, 9)).tolist() == [1, 2, 4]
    assert common(found, torch.tensor([0, 3, 5]), torch.arange(6, 9)).tolist() == []


def test_samples_that_are_evaluated_on_too_are_noted() -> None:
    found = tokenized([1], [2, 3], [4], [2, 3])
    parts = (Part(name="a", first=0, samples=3), Part(name="b", first=3, samples=1, held_out=True))
    assert overlap_note(found, parts) == "1 of 3 training samples are in b too, and evaluated on"
    assert overlap_note(found, parts[:1]) == ""
    assert overlap_note(tokenized([1], [2, 3], [4], [2, 4]), parts) == ""
