"""How many rows of logits does a fused loss have at a time? The kernel and the plan go by the same rule."""

from math import ceil

FEWEST_ROWS = 256
"""Rows below which reading the head takes longer than multiplying with it: each chunk reads the whole head twice.
Chunks of as many elements as the hidden states (Liger's rule) are 32 rows for Gemma 3, its loss a third of a step."""


def loss_rows(tokens: int, vocabulary: int, hidden: int) -> int:
    """Rows of logits at a time: about as many elements as the hidden states have, and at least `FEWEST_ROWS`."""
    each = ceil(tokens / ceil(vocabulary / hidden))
    return min(tokens, max(FEWEST_ROWS, 1 << (each - 1).bit_length()))


def fused_loss_bytes(tokens: int, vocabulary: int, hidden: int, compute_bytes: int) -> int:
    """Bytes of a chunk of logits, whose gradient takes their place, and of the gradient of all hidden states."""
    return (loss_rows(tokens, vocabulary, hidden) * vocabulary + tokens * hidden) * compute_bytes
