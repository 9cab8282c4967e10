"""A text longer than a model takes, in windows that predict each of its tokens once."""

from collections.abc import Iterator, Sequence

from qdist.core.evaluation.scoring import Item

USUAL_WINDOW = 2048
"""Tokens of a window, where none is set and the model has as many positions."""


def longest_scored(seq_len: int, positions: int) -> int:
    """Most tokens of an item where no window is set: the same while a run trains and in `qdist evaluate` of it.

    seq_len: tokens of the run's samples, at most. positions: of the model.
    """
    return min(max(seq_len, USUAL_WINDOW), positions)


def windows(tokens: Sequence[int], *, window: int, stride: int) -> Iterator[Item]:
    """The windows of a text, each with the positions that no earlier one has predicted.

    window: tokens of each, at most. stride: tokens from the start of one to the start of the next, at most `window`.
    The first token of a text has nothing to predict it. With stride = window the windows are disjoint, and nothing
    predicts the first token of any of them: as the usual loop over transformers has it.
    """
    seen = 0
    for start in range(0, len(tokens), stride):
        end = min(start + window, len(tokens))
        first = max(seen, start + 1)
        if first < end:
            positions = range(first - 1 - start, end - 1 - start)
            yield Item(tuple(tokens[start:end]), tuple(positions), tuple(tokens[first:end]))
        seen = end
        if end == len(tokens):
            return
