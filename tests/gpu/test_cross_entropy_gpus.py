"""The kernel of the fused loss on a real GPU, beside its torch reference."""

import pytest
import torch

from qdist.runtime.kernels.cross_entropy import IGNORED, losses_and_gradients, losses_and_gradients_reference


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("after", "softcap"), [(1.0, None), (0.25, None), (1.0, 30.0)])
@pytest.mark.parametrize("vocabulary", [17, 1000, 32_000, 262_208])
def test_losses_and_gradients_are_those_of_torch(
    vocabulary: int, after: float, softcap: float | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    logits = (8 * torch.randn(7, vocabulary, device="cuda")).to(dtype)
    wanted = torch.randint(0, vocabulary, (7,), device="cuda")
    wanted[[2, 6]] = IGNORED
    expected, gradients = losses_and_gradients_reference(logits, wanted, after=after, softcap=softcap)
    losses = torch.full((7,), float("nan"), device="cuda")
    losses_and_gradients(logits, wanted, losses, after=after, softcap=softcap)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    rounding = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(logits.float(), gradients, rtol=rounding, atol=1e-5)
