"""Cross entropy fused with the output head: logits of a chunk of tokens at a time, their gradient in their place.

As Liger's fused linear cross entropy (Hsu et al. 2024), but without waiting for the GPU to count the targets, so that a
CUDA graph can hold it. The gradient of the head's weights is computed only where rows of new tokens are trained.
"""

from functools import cache
from typing import Any

import torch

from qdist.core.planning.loss import loss_rows
from qdist.runtime.kernels.launching import on_device

IGNORED = -100
_WIDEST_BLOCK = 8192
"""Logits that a program reads at a time; a row of a vocabulary takes several turns."""


def fused_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    wanted: torch.Tensor,
    *,
    after: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Summed cross entropy of logits = cap(after x (hidden W' + bias)), a float32 scalar; on CUDA alone.

    hidden: [tokens, hidden size], in the dtype of weight [vocabulary, hidden size]. wanted: int64 [tokens], -100 for
    tokens without a loss. after, softcap: as in `qdist.runtime.engine.head.HeadRule`.
    """
    total: torch.Tensor = _Fused.apply(hidden, weight, bias, wanted, after, softcap)
    return total


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        wanted: torch.Tensor,
        after: float,
        softcap: float | None,
    ) -> torch.Tensor:
        tokens, width = hidden.shape
        vocabulary = weight.shape[0]
        losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        rows = loss_rows(tokens, vocabulary, width)
        for start in range(0, tokens, rows):
            part = slice(start, min(start + rows, tokens))
            # Autocast would cast the weights anew for each chunk.
            with torch.autocast(hidden.device.type, enabled=False):
                logits = torch.nn.functional.linear(hidden[part], weight, bias)
                losses_and_gradients(logits, wanted[part], losses[part], after=after, softcap=softcap)
                torch.mm(logits, weight, out=gradient[part])
                if of_weight is not None:
                    of_weight.addmm_(logits.t(), hidden[part])
                del logits  # before the next chunk's are there
        ctx.save_for_backward(gradient, of_weight)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, of_weight = ctx.saved_tensors
        scale = gradients[0].to(gradient.dtype)
        return gradient * scale, None if of_weight is None else of_weight * scale, None, None, None, None


def losses_and_gradients(
    logits: torch.Tensor, wanted: torch.Tensor, losses: torch.Tensor, *, after: float, softcap: float | None
) -> None:
    """Write each row's cross entropy into losses [tokens], and its gradient over logits [tokens, vocabulary]."""
    tokens, vocabulary = logits.shape
    block = min(_WIDEST_BLOCK, 1 << (vocabulary - 1).bit_length())
    with on_device(logits.device):
        _kernel()[(tokens,)](
            logits, wanted, losses, logits.stride(0), after, softcap or 1.0, VOCABULARY=vocabulary,
            CAPPED=softcap is not None, BLOCK=block, num_warps=16 if block >= 4096 else 4,
        )  # fmt: skip


def losses_and_gradients_reference(
    logits: torch.Tensor, wanted: torch.Tensor, *, after: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with torch: (losses, gradients), float32."""
    values = logits.detach().float().requires_grad_()
    with torch.enable_grad():
        scaled = values * after
        capped = scaled if softcap is None else softcap * torch.tanh(scaled / softcap)
        losses = torch.nn.functional.cross_entropy(capped, wanted, reduction="none", ignore_index=IGNORED)
        (gradients,) = torch.autograd.grad(losses.sum(), values)
    return losses.detach(), gradients


@cache
def _kernel() -> Any:
    """The kernel, compiled on first use: Triton exists only with a GPU."""
    import triton
    import triton.language as tl

    @triton.jit
    def entropy(  # type: ignore[no-untyped-def]
        logits, wanted, losses, stride, after, softcap,
        VOCABULARY: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        target = tl.load(wanted + row)
        start = logits + row.to(tl.int64) * stride
        place = tl.arange(0, BLOCK)
        if target < 0:
            for first in range(0, VOCABULARY, BLOCK):
                at = first + place
                tl.store(start + at, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=at < VOCABULARY)
            tl.store(losses + row, 0.0)
            return
        largest, total = -float("inf"), 0.0
        for first in range(0, VOCABULARY, BLOCK):
            at = first + place
            value = tl.load(start + at, mask=at < VOCABULARY, other=-float("inf")).to(tl.float32) * after
            if CAPPED:
                value = tl.where(at < VOCABULARY, softcap * (2 * tl.sigmoid(2 * value / softcap) - 1), -float("inf"))
            higher = tl.maximum(largest, tl.max(value))
            total = total * tl.exp(largest - higher) + tl.sum(tl.exp(value - higher))
            largest = higher
        entire = largest + tl.log(total)
        own = tl.load(start + target).to(tl.float32) * after
        if CAPPED:
            own = softcap * (2 * tl.sigmoid(2 * own / softcap) - 1)
        tl.store(losses + row, entire - own)
        tl.debug_barrier()  # the wanted logit is read before its gradient takes its place
        for first in range(0, VOCABULARY, BLOCK):
            at = first + place
            value = tl.load(start + at, mask=at < VOCABULARY, other=-float("inf")).to(tl.float32) * after
            slope = after
            if CAPPED:
                bent = 2 * tl.sigmoid(2 * value / softcap) - 1
                value = softcap * bent
                slope = after * (1 - bent * bent)
            share = tl.exp(value - entire) - tl.where(at == target, 1.0, 0.0)
            tl.store(start + at, (share * slope).to(logits.dtype.element_ty), mask=at < VOCABULARY)

    return entropy
