"""How probable does a model find given tokens? The question that every scored task is made of."""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

CameTo = Callable[[int], None]
"""Called with the number of items that are scored so far."""


class Item(msgspec.Struct, frozen=True):
    """A text, and the tokens whose probability is asked at some of its positions."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    """Indices into `tokens`: the prediction behind `tokens[: position + 1]` is asked. The same may be asked again."""
    targets: tuple[int, ...]
    """The token whose probability is asked, for each position."""


class Scored(msgspec.Struct, frozen=True):
    """The answers to an item, one for each of its positions."""

    logprobs: tuple[float, ...]
    """Natural logarithms, of float32 logits."""
    greedy: tuple[bool, ...]
    """Whether no token is more probable than the target."""


class Scorer(Protocol):
    """A loaded model that scores items, wherever its parts lie."""

    longest: int
    """Most tokens of an item."""

    def score(self, items: Sequence[Item], came_to: CameTo) -> list[Scored]:
        """The answers to all items, in their order. Where ranks hold the model: called by all, answered to all."""


def continuation(context: Sequence[int], answer: Sequence[int], *, longest: int) -> Item:
    """The item that asks for an answer behind a context, of which the end is kept if both are longer than `longest`.

    context: at least one token. answer: at least one, and at most `longest`.
    """
    tokens = (*context, *answer)[-longest - 1 :]
    first = len(tokens) - len(answer)
    return Item(tokens[:-1], tuple(range(first - 1, len(tokens) - 1)), tokens[first:])
