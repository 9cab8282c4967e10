"""The fused loss: its walk over pieces, its gradients; the kernel that it calls needs a GPU (tests/gpu)."""

import pytest
import torch
from torch.nn import functional

from qdist.core.planning import loss
from qdist.runtime.kernels import cross_entropy
from qdist.runtime.kernels.cross_entropy import IGNORED, fused_cross_entropy, losses_and_gradients_reference

TOKENS, HIDDEN, VOCABULARY = 11, 8, 30


def by_reference(
    logits: torch.Tensor, wanted: torch.Tensor, losses: torch.Tensor, *, after: float, softcap: float | None
) -> None:
    """What the kernel does, in place."""
    own, gradients = losses_and_gradients_reference(logits, wanted, after=after, softcap=softcap)
    losses.copy_(own)
    logits.copy_(gradients)


@pytest.mark.parametrize(("after", "softcap"), [(1.0, None), (0.5, None), (1.0, 3.0)])
@pytest.mark.parametrize("fewest", [2, 64])
def test_pieces_of_logits_have_the_loss_and_gradients_of_all(
    monkeypatch: pytest.MonkeyPatch, after: float, softcap: float | None, fewest: int
) -> None:
    monkeypatch.setattr(loss, "FEWEST_ROWS", fewest)
    monkeypatch.setattr(cross_entropy, "losses_and_gradients", by_reference)
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(TOKENS, HIDDEN, requires_grad=True),
        torch.randn(VOCABULARY, HIDDEN, requires_grad=True),
    )
    bias, wanted = torch.randn(VOCABULARY), torch.randint(0, VOCABULARY, (TOKENS,))
    wanted[[0, 7]] = IGNORED
    scaled = functional.linear(hidden, weight, bias) * after
    capped = scaled if softcap is None else softcap * torch.tanh(scaled / softcap)
    expected = functional.cross_entropy(capped, wanted, reduction="sum", ignore_index=IGNORED)
    total = fused_cross_entropy(hidden, weight, bias, wanted, after=after, softcap=softcap)
    torch.testing.assert_close(total, expected)
    for own, theirs in zip(
        torch.autograd.grad(2 * total, (hidden, weight)),
        torch.autograd.grad(2 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(own, theirs)


def test_a_frozen_head_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "losses_and_gradients", by_reference)
    hidden, weight = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randn(VOCABULARY, HIDDEN)
    fused_cross_entropy(hidden, weight, None, torch.zeros(TOKENS, dtype=torch.int64)).backward()
    assert hidden.grad is not None
    assert weight.grad is None
