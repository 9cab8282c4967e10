"""GPU memory that quantizing by GPTQ takes at its fullest, from a model's shape alone."""

from collections import Counter
from typing import NamedTuple

from qdist.core.facts import ModelFacts

_FLOAT = 4
"""Bytes of a number in a Hessian, and of a weight that is being quantized."""
_SQUARES = 5
"""Matrices as large as a Hessian while it is factored: itself, reversed, its factor, the inverse's, a solver's copy."""
_COLUMNS = 2048
"""Of such matrices, that are worked on at a time, four times over."""
_WEIGHTS = 7
"""Matrices as large as a linear while it is quantized: as it was, what is left of it, codes, values, differences."""


class Needs(NamedTuple):
    """Bytes of one GPU."""

    layer: int
    """A decoder layer's weights."""
    hidden: int
    """Hidden states that stay on the GPU."""
    running: int
    """What a batch of samples leaves on its way through the layer, at most."""
    summing: int
    """Hessians that are being summed."""
    factoring: int
    """A Hessian and its factors."""
    solving: int
    """A linear that is being quantized."""

    @property
    def total(self) -> int:
        """At the fullest moment."""
        return self.layer + self.hidden + max(self.running + self.summing, self.factoring, self.solving)


def needs(
    facts: ModelFacts, *, batch: int, tokens: int, hidden: int, lanes: int, number_bytes: int, first: bool
) -> Needs:
    """What a GPU needs.

    batch: samples of `tokens` tokens that go through a layer together. hidden: bytes of hidden states that stay.
    lanes: sums that the GPU makes. number_bytes: of a weight at work. first: the GPU on which sums are added up.
    """
    squares = [_FLOAT * linear.inputs**2 for linear in facts.linears]
    widest, count = max(linear.inputs for linear in facts.linears), batch * tokens
    readers = Counter(linear.reads for linear in facts.linears)  # those of one tensor are solved on a GPU each
    mlp = 3 * facts.intermediate + 4 * facts.hidden
    # Scores that a model writes out are there as products, in float32 for the softmax, and after it.
    scores = facts.heads * tokens * (2 * number_bytes + 2 * _FLOAT) if facts.attention == "eager" else 0
    attention = 10 * facts.hidden * number_bytes + scores
    columns = 4 * _FLOAT * widest * _COLUMNS
    return Needs(
        layer=number_bytes * sum(linear.weights for linear in facts.linears),
        hidden=hidden,
        running=count * max(mlp * number_bytes, attention, 3 * _FLOAT * facts.hidden),
        summing=max(squares) * (1 + (lanes - 1).bit_length()) + columns // 4,  # by twos, as in a binary counter
        factoring=_SQUARES * max(squares) + columns if first else 0,
        solving=max(
            (
                2 * _FLOAT * linear.inputs**2 + _WEIGHTS * _FLOAT * linear.weights
                for linear in facts.linears
                if first or readers[linear.reads] > 1
            ),
            default=0,
        ),
    )
