"""Which training samples are evaluated on too? Found by their tokens."""

from collections.abc import Sequence

import torch

from qdist.core.planning.plan import Part
from qdist.runtime.data.tokenized import TokenizedSet

_LOOKED_AT = 8
"""Tokens of a sample, evenly spread, by which those that may be equal are found."""


def overlap_note(tokenized: TokenizedSet, parts: Sequence[Part]) -> str:
    """How many training samples are in the sources that are evaluated on too; empty if none is."""
    evaluated = [part for part in parts if part.held_out]
    if not evaluated:
        return ""
    held_out = torch.cat([torch.arange(part.first, part.stop) for part in evaluated])
    train = torch.arange(len(tokenized) - len(held_out))
    count, names = len(common(tokenized, train, held_out)), " and ".join(part.name for part in evaluated)
    return f"{count:,} of {len(train):,} training samples are in {names} too, and evaluated on" if count else ""


def common(tokenized: TokenizedSet, samples: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Those of `samples` that have the same tokens as one of `others`; all are int64 indices.

    Only samples of which the length and a few tokens are found among the others' are compared whole.
    """
    near = samples[torch.isin(_marks(tokenized, samples), _marks(tokenized, others))]
    known = {_content(tokenized, index) for index in others.tolist()} if len(near) else set[bytes]()
    return torch.tensor([index for index in near.tolist() if _content(tokenized, index) in known], dtype=torch.int64)


def _marks(tokenized: TokenizedSet, samples: torch.Tensor) -> torch.Tensor:
    """A number for each sample, int64 [samples], that equal ones share: of its length and a few of its tokens."""
    starts, lengths = tokenized.offsets[:-1][samples], tokenized.offsets.diff()[samples]
    marks = lengths.clone()
    for place in range(_LOOKED_AT):
        token = tokenized.tokens[starts + (lengths - 1) * place // (_LOOKED_AT - 1)]
        marks = marks * 1_000_003 + token  # wraps around, as a hash may
    return marks


def _content(tokenized: TokenizedSet, index: int) -> bytes:
    return tokenized.tokens[tokenized.span(index)].numpy().tobytes()
