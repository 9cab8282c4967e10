"""The token of each row sees the keys of its row that the model's layer has it see."""

from typing import Any

import pytest
import torch
from torch import nn

from qdist.runtime.infer.attention import UndecodableError, attend, mask_of_rows
from qdist.runtime.kernels.decode_attention import torch_attention

LENGTHS = torch.tensor([3, 12, 1, 8])
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("window", [0, 5, 12, 40])
@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0}, {"s_aux": SINKS}, {"softcap": 2.0, "s_aux": SINKS}])
def test_rows_are_computed_as_the_reference_of_the_kernel(window: int, extras: dict[str, Any]) -> None:
    query, key, value = drawn(4, 4, 1, 8), drawn(4, 2, 12, 8), drawn(4, 2, 12, 8)
    told = mask_of_rows(q_offset=LENGTHS, kv_length=12, local_size=window or None)
    mixed, _ = attend(nn.Identity(), query, key, value, told, scaling=0.4, **extras)
    wanted = torch_attention(
        query, key, value, LENGTHS, 0.4, window, sinks=extras.get("s_aux"), softcap=extras.get("softcap")
    )
    assert torch.allclose(mixed, wanted, atol=1e-6)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0, "s_aux": SINKS}])
def test_rows_of_one_length_are_computed_without_a_mask(window: int, extras: dict[str, Any]) -> None:
    query, key, value, lengths = drawn(4, 4, 1, 8), drawn(4, 2, 12, 8), drawn(4, 2, 12, 8), torch.full((4,), 12)
    told = mask_of_rows(q_offset=lengths, kv_length=12, local_size=window or None)
    mixed, _ = attend(nn.Identity(), query, key, value, told, scaling=0.4, **extras)
    wanted = torch_attention(
        query, key, value, lengths, 0.4, window, sinks=extras.get("s_aux"), softcap=extras.get("softcap")
    )
    assert torch.allclose(mixed, wanted, atol=1e-6)


@pytest.mark.parametrize("extras", [{"softcap": 2.0}, {"s_aux": SINKS}])
def test_a_prompt_is_computed_in_blocks_as_its_tokens_one_by_one(extras: dict[str, Any]) -> None:
    query, key, value = drawn(1, 4, 300, 8), drawn(1, 2, 300, 8), drawn(1, 2, 300, 8)
    mixed, _ = attend(nn.Identity(), query, key, value, None, scaling=0.4, **extras)
    for place in (0, 255, 256, 299):
        wanted = torch_attention(
            query[:, :, place : place + 1], key, value, torch.tensor([place + 1]), 0.4, sinks=extras.get("s_aux"),
            softcap=extras.get("softcap"),
        )  # fmt: skip
        assert torch.allclose(mixed[:, place : place + 1], wanted, atol=1e-6)


def test_values_may_be_narrower_than_keys() -> None:
    query, key, value = drawn(4, 4, 1, 12), drawn(4, 2, 12, 12), drawn(4, 2, 12, 8)
    told = mask_of_rows(q_offset=LENGTHS, kv_length=12)
    mixed, _ = attend(nn.Identity(), query, key, value, told)
    padded = torch_attention(query, key, nn.functional.pad(value, (0, 4)), LENGTHS, 12**-0.5)
    assert torch.allclose(mixed, padded[..., :8], atol=1e-6)


@pytest.mark.parametrize("mask", [None, torch.ones(4, 1, 1, 12, dtype=torch.bool), torch.zeros(4, 1, 1, 12)])
def test_a_mask_that_says_nothing_of_rows_is_refused(mask: torch.Tensor | None) -> None:
    with pytest.raises(UndecodableError, match="Identity makes a mask of its own"):
        attend(nn.Identity(), drawn(4, 4, 1, 8), drawn(4, 2, 12, 8), drawn(4, 2, 12, 8), mask)


def test_a_bias_on_scores_is_refused() -> None:
    with pytest.raises(UndecodableError, match="adds a bias"):
        attend(nn.Identity(), drawn(1, 1, 2, 8), drawn(1, 1, 2, 8), drawn(1, 1, 2, 8), None, position_bias=drawn(2, 2))
