"""The training objective: cross entropy summed over learned tokens, computing logits only for those."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from qdist.runtime.data.batches import Samples
from qdist.runtime.engine.head import HeadRule, class_logits, head_rule
from qdist.runtime.kernels.cross_entropy import fused_cross_entropy
from qdist.runtime.model.causal import takes_whole_rows, whole_rows
from qdist.runtime.model.parts import decoder_of, head_of

IGNORED = -100


def summed_loss(model: Any, batch: Mapping[str, torch.Tensor], *, fused: bool) -> torch.Tensor:
    """Sum of the next-token cross entropy over labels other than -100, a float32 scalar.

    batch: input_ids and labels, int64 [batch, length] on the CPU, right-padded. Causal attention makes a mask
    unnecessary: no real token attends to the padding behind it.
    fused: use the fused linear cross entropy, which never holds all logits.
    """
    inputs = batch["input_ids"].to(model.device, non_blocking=True)
    return loss_of(model, hidden_states(model, inputs), batch["labels"], fused=fused)


def hidden_states(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    """The decoder's output for token ids, int64 [batch, length], or for hidden states, [batch, length, hidden]."""
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    seen = {"attention_mask": whole_rows(inputs)} if takes_whole_rows(model) else {}
    hidden: torch.Tensor = decoder_of(model)(**{name: inputs}, **seen, use_cache=False)[0]
    return hidden


def loss_of(model: Any, hidden: torch.Tensor, labels: torch.Tensor, *, fused: bool) -> torch.Tensor:
    """The summed loss from hidden states after the final norm and labels on the CPU, both [batch, length, ...]."""
    head, rule = head_of(model), head_rule(model)
    device = next(head.parameters()).device  # of a model spread over GPUs, not always where the hidden states are
    targets = labels[:, 1:].reshape(-1)
    learned = (targets != IGNORED).nonzero().squeeze(1)
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    picked = flat.index_select(0, learned.to(hidden.device, non_blocking=True)).to(device)
    wanted = targets[learned].to(device, non_blocking=True)
    if not rule.plain:
        return functional.cross_entropy(class_logits(model, picked[None])[0].float(), wanted, reduction="sum")
    # A sharded head brings the method itself, so that FSDP gathers its weights around it.
    entropy = getattr(head, "cross_entropy", None) or partial(cross_entropy, head)
    total: torch.Tensor = entropy(picked, wanted, rule, fused=fused)
    return total


def cross_entropy(
    head: Any, hidden: torch.Tensor, wanted: torch.Tensor, rule: HeadRule, *, fused: bool
) -> torch.Tensor:
    """Summed cross entropy of an output embedding on hidden states [tokens, hidden] against the tokens `wanted`."""
    if fused:
        inner = rule.into(hidden).to(head.weight.dtype)
        return fused_cross_entropy(inner, head.weight, head.bias, wanted, after=rule.after, softcap=rule.softcap)
    return functional.cross_entropy(rule.of(head(rule.into(hidden)).float()), wanted, reduction="sum")


CameTo = Callable[[int], None]
"""Called with the number of each micro-batch, from 1, before it is computed."""
Evaluate = Callable[[list[list[int]], CameTo], tuple[float, int]]
"""A rank's (summed loss, learned tokens) over micro-batches of sample indices."""


def unseen(count: int) -> None:
    """The default callback of an evaluation: does nothing."""


class Forward:
    """Losses of a PEFT model. The adapter is float32; autocast casts it to the backbone's precision."""

    def __init__(self, model: Any, samples: Samples, *, dtype: torch.dtype, fused: bool) -> None:
        self.model, self.samples, self.dtype, self.fused = model, samples, dtype, fused
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy summed over a micro-batch's learned tokens."""
        with self._autocast():
            return summed_loss(self._base, batch, fused=self.fused)

    def part(self, inputs: torch.Tensor) -> torch.Tensor:
        """The decoder layers on this rank: from token ids, or the previous stage's hidden states, to hidden states."""
        with self._autocast():
            return hidden_states(self._base, inputs)

    def loss_of(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The last stage's final step: the summed loss from the output of `part`."""
        with self._autocast():
            return loss_of(self._base, hidden, labels, fused=self.fused)

    @torch.no_grad()
    def evaluate(self, batches: list[list[int]], came_to: CameTo = unseen) -> tuple[float, int]:
        """(summed loss, learned tokens) over micro-batches of sample indices, without dropout."""
        losses = []
        with self.without_dropout():
            for count, indices in enumerate(batches, 1):
                came_to(count)
                losses.append(self.loss(self.samples.batch(indices)).double())
        return float(sum(losses)), sum(map(self.samples.learned, batches))

    @contextlib.contextmanager
    def without_dropout(self) -> Iterator[None]:
        """A context with the model in evaluation mode; restores its mode afterwards."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._base.device.type, dtype=self.dtype)
