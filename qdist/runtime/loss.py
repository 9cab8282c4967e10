"""The loss: cross entropy summed over learned tokens, with logits computed for those tokens alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

IGNORED = -100


def summed_loss(model: Any, batch: Mapping[str, torch.Tensor], *, fused: bool) -> torch.Tensor:
    """Sum of the next-token cross entropy over labels other than -100, as a float32 scalar.

    batch: input_ids and labels, int64 [batch, length] on the CPU, right-padded. Causal attention makes a mask
    unnecessary: no real token attends to the padding behind it.
    fused: use Liger's fused linear cross entropy (Hsu et al. 2024), which never holds all logits.
    """
    device = model.device
    targets = batch["labels"][:, 1:].reshape(-1)
    learned = (targets != IGNORED).nonzero().squeeze(1)
    hidden = model.get_decoder()(input_ids=batch["input_ids"].to(device, non_blocking=True), use_cache=False)[0]
    picked = hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, learned.to(device, non_blocking=True))
    wanted = targets[learned].to(device, non_blocking=True)
    head = model.get_output_embeddings()
    if fused:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        total = LigerFusedLinearCrossEntropyLoss(reduction="sum")(
            head.weight, picked.to(head.weight.dtype), wanted, head.bias
        )
    else:
        total = functional.cross_entropy(head(picked).float(), wanted, reduction="sum")
    return total
