"""What Liger's kernels are given."""

import torch

from qdist.runtime.placements.liger import by_rows

ROWS, HEADS, SIZE = 4, 2, 16


def row_strides(query: torch.Tensor, key: torch.Tensor, scale: float) -> tuple[int, int, torch.Tensor]:
    """By what Liger's kernel goes from a row to the next, and what it would rotate."""
    there = [each.transpose(1, 2).contiguous() for each in (query, key)]
    return there[0].stride(1), there[1].stride(1), scale * there[0].transpose(1, 2)


def test_rows_of_one_token_do_not_lie_over_each_other_whatever_the_query_was_made_by() -> None:
    of_norm = torch.randn(ROWS, HEADS, 1, SIZE)
    of_linear = torch.randn(ROWS, 1, HEADS, SIZE).transpose(1, 2)
    of_slice = torch.randn(ROWS, HEADS, 3, SIZE)[:, :, 1:2]
    assert row_strides(of_norm, of_linear, 1.0)[0] == SIZE  # a head's, where a row's is meant
    for query in (of_norm, of_linear, of_slice):
        for_query, for_key, rotated = by_rows(row_strides)(query, of_norm, scale=1.0)
        assert for_query == for_key == HEADS * SIZE
        assert torch.equal(rotated, query)


def test_prompts_are_passed_on_as_they_are() -> None:
    query = torch.randn(ROWS, HEADS, 5, SIZE)
    assert by_rows(lambda *given: given)(query, query, 1)[0] is query
