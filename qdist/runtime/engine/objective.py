"""The training objective: cross entropy summed over learned tokens, computing logits only for those."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional

from qdist.runtime.data.batches import Samples, pick
from qdist.runtime.engine.head import HeadRule, class_logits, head_rule
from qdist.runtime.kernels.cross_entropy import fused_cross_entropy
from qdist.runtime.model.apart import Boundaries, keep_samples_apart, keeps_samples_apart, require_apart
from qdist.runtime.model.causal import takes_whole_rows, whole_rows
from qdist.runtime.model.parts import decoder_layers, decoder_of, head_of


def summed_loss(model: Any, batch: Mapping[str, torch.Tensor], *, fused: bool, longest: int = 0) -> torch.Tensor:
    """Sum of the next-token cross entropy over labels other than -100, a float32 scalar.

    batch: as `Samples.batch` makes it, on any device; without `picked` and `targets` they are found in `labels`.
    Padding is on the right, so causal attention makes a mask unnecessary: no real token attends to what is behind it.
    fused: use the fused linear cross entropy, which never holds all logits.
    longest: tokens of the longest sample in a packed row; 0 for the whole row.
    """
    inputs = batch["input_ids"].to(model.device, non_blocking=True)
    hidden = hidden_states(model, inputs, boundaries_of(batch, inputs.device, longest=longest))
    return loss_of(model, hidden, batch, fused=fused)


def boundaries_of(batch: Mapping[str, torch.Tensor], device: torch.device, *, longest: int = 0) -> Boundaries | None:
    """Where the samples of a packed micro-batch are, on a device; None for one with a row a sample."""
    if "ends" not in batch:
        return None
    positions, ends = (batch[key].to(device, non_blocking=True) for key in ("positions", "ends"))
    return Boundaries(positions, ends, longest or positions.shape[1])


def hidden_states(model: Any, inputs: torch.Tensor, boundaries: Boundaries | None = None) -> torch.Tensor:
    """The decoder's output for token ids, int64 [batch, length], or for hidden states, [batch, length, hidden].

    boundaries: of the samples in a packed row, for a model whose attention goes by them (`keep_samples_apart`).
    """
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    named: dict[str, Any] = {}
    if boundaries is not None:
        assert keeps_samples_apart(model)
        named = boundaries.arguments()
    elif takes_whole_rows(model):
        named = {"attention_mask": whole_rows(inputs)}
    hidden: torch.Tensor = decoder_of(model)(**{name: inputs}, use_cache=False, **named)[0]
    return hidden


def loss_of(model: Any, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], *, fused: bool) -> torch.Tensor:
    """The summed loss from hidden states after the final norm, [batch, length, hidden].

    batch: `picked` and `targets`, the flattened positions with a loss and the tokens wanted there, -100 for none; or
    `labels`, to find them in.
    """
    head, rule = head_of(model), head_rule(model)
    picked, wanted = _picked(head, hidden, batch if "picked" in batch else pick(batch["labels"]))
    if not rule.plain:
        return functional.cross_entropy(class_logits(model, picked[None])[0].float(), wanted, reduction="sum")
    return cross_entropy(head, picked, wanted, rule, fused=fused)


def _picked(head: Any, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states at a batch's picked positions, [n, hidden], and its targets, where the head is."""
    device = next(head.parameters()).device  # of a model spread over GPUs, not always where the hidden states are
    flat = hidden.reshape(-1, hidden.shape[-1])
    picked = flat.index_select(0, batch["picked"].to(hidden.device, non_blocking=True)).to(device)
    return picked, batch["targets"].to(device, non_blocking=True)


def scores_of(model: Any, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Each target's log-probability, and 1 where no token is more probable, else 0: float32 [n, 2].

    hidden: states after the final norm, [batch, length, hidden]. batch: `picked` and `targets`, as for `loss_of`.
    Logits are float32, of so many positions at a time that they take no more than some MB.
    """
    picked, wanted = _picked(head_of(model), hidden, batch)
    found = []
    for states, targets in zip(picked.split(_AT_A_TIME), wanted.split(_AT_A_TIME), strict=True):
        logits = _logits(model, states)
        chosen = logits.gather(1, targets[:, None])[:, 0]
        found.append(torch.stack([chosen - logits.logsumexp(1), (chosen >= logits.amax(1)).float()], 1))
    return torch.cat(found) if found else picked.new_zeros((0, 2), dtype=torch.float32)


_AT_A_TIME = 128
"""Positions whose logits exist at a time: 64 MiB for a vocabulary of 128 thousand."""


def _logits(model: Any, picked: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states [n, hidden], float32 [n, vocabulary]."""
    rule = head_rule(model)
    if not rule.plain:
        own: torch.Tensor = class_logits(model, picked[None])[0].float()
        return own
    return rule.of(head_of(model)(rule.into(picked)).float())


def cross_entropy(
    head: Any, hidden: torch.Tensor, wanted: torch.Tensor, rule: HeadRule, *, fused: bool
) -> torch.Tensor:
    """Summed cross entropy of an output embedding on hidden states [tokens, hidden] against the tokens `wanted`.

    Where -100 is wanted there is no loss.
    """
    if fused:
        inner = rule.into(hidden).to(head.weight.dtype)
        return fused_cross_entropy(inner, head.weight, head.bias, wanted, after=rule.after, softcap=rule.softcap)
    return functional.cross_entropy(rule.of(head(rule.into(hidden)).float()), wanted, reduction="sum")


_TRIED = 4
"""Tokens of each sample that is tried for a check."""
CameTo = Callable[[int], None]
"""Called with the number of each micro-batch, from 1, before it is computed."""
Evaluate = Callable[[list[list[int]], CameTo], tuple[float, int]]
"""A rank's (summed loss, learned tokens) over micro-batches of sample indices."""
Batch = Mapping[str, torch.Tensor]
ScoreBatches = Callable[[Iterable[Batch], CameTo], list[torch.Tensor]]
"""What `scores_of` gives for each of a rank's batches, in host memory; nothing on ranks without the head."""


def unseen(count: int) -> None:
    """The default callback of an evaluation: does nothing."""


class Passes:
    """Forward passes of a model, or of a stage of one, with an adapter or without.

    The adapter is float32; autocast casts it to the backbone's precision.
    """

    def __init__(self, model: Any, *, dtype: torch.dtype, longest: int = 0) -> None:
        """longest: tokens of the longest sample in a packed row; 0 where no row is packed."""
        self.model, self.dtype, self._longest = model, dtype, longest
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def part(self, inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The decoder layers on this rank: from token ids, or the previous stage's hidden states, to hidden states.

        batch: the micro-batch that they are of, for its boundaries.
        """
        boundaries = boundaries_of(batch, inputs.device, longest=self._longest)
        with self._autocast():
            return hidden_states(self._base, inputs, boundaries)

    def scores_of(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The last stage's final step of an evaluation: answers from the output of `part`."""
        with self._autocast():
            return scores_of(self._base, hidden, batch)

    @torch.no_grad()
    def score(self, batches: Iterable[Batch], came_to: CameTo = unseen) -> list[torch.Tensor]:
        """`ScoreBatches` of a rank that computes its passes alone, without dropout."""
        found = []
        with self.without_dropout():
            for count, batch in enumerate(batches, 1):
                came_to(count)
                hidden = self.part(batch["input_ids"].to(self._base.device, non_blocking=True), batch)
                found.append(self.scores_of(hidden, batch).cpu())
        return found

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


class Forward(Passes):
    """Losses of a PEFT model on a run's samples."""

    def __init__(self, model: Any, samples: Samples, *, dtype: torch.dtype, fused: bool) -> None:
        super().__init__(model, dtype=dtype, longest=samples.plan.seq_len)
        self.samples, self.fused = samples, fused
        if samples.plan.packed:
            keep_samples_apart(self._base)

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy summed over a micro-batch's learned tokens."""
        with self._autocast():
            return summed_loss(self._base, batch, fused=self.fused, longest=self.samples.plan.seq_len)

    def loss_of(self, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The last stage's final step: the summed loss from the output of `part`."""
        with self._autocast():
            return loss_of(self._base, hidden, batch, fused=self.fused)

    @torch.no_grad()
    def check(self) -> None:
        """Try a packed row of two samples. Raises JobError if a layer here has attention from one to the other.

        Collective where ranks hold parts of a layer. Does nothing in a run that packs nothing.
        """
        if not self.samples.plan.packed:
            return
        batch = {
            "positions": torch.arange(_TRIED).repeat(1, 2),
            "ends": torch.tensor([0, _TRIED, 2 * _TRIED], dtype=torch.int32),
        }
        shape, device = (1, 2 * _TRIED), self._base.device
        inputs = torch.zeros(shape, dtype=torch.int64, device=device)
        if (
            next(decoder_layers(self._base)[0].parameters(), None) is None
        ):  # a later stage, which is given hidden states
            inputs = torch.zeros((*shape, self.samples.plan.facts.hidden), dtype=self.dtype, device=device)
        with self.without_dropout():
            self.part(inputs, batch)
        require_apart(self._base)

    @torch.no_grad()
    def evaluate(self, batches: list[list[int]], came_to: CameTo = unseen) -> tuple[float, int]:
        """(summed loss, learned tokens) over micro-batches of sample indices, without dropout."""
        losses = []
        with self.without_dropout():
            for count, indices in enumerate(batches, 1):
                came_to(count)
                losses.append(self.loss(self.samples.batch(indices)).double())
        return float(sum(losses)), sum(map(self.samples.learned, batches))
