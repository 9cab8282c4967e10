"""What a step trains on, and what a run is judged by: the tokenized set seen through the plan."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from qdist.core.plan import Plan
from qdist.runtime.batches import collate, sample_order, split, width_of
from qdist.runtime.tokenized import Summary, TokenizedSet, learned_tokens, load


class Samples:
    """Micro-batches by step. Everything is a function of the plan and the step, never of what came before."""

    def __init__(self, plan: Plan, tokenized: TokenizedSet, *, pad_id: int) -> None:
        self.plan, self.tokenized, self.pad_id = plan, tokenized, pad_id
        self._train, held_out = split(len(tokenized), held_out=plan.spec.train.held_out, seed=plan.spec.seed)
        self.held_out: list[int] = held_out.tolist()

    def step(self, step: int) -> list[list[int]]:
        """The samples of a step, micro-batch by micro-batch, for all ranks together."""
        size = self.plan.spec.global_batch
        order = sample_order(len(self._train), seed=self.plan.spec.seed, position=step * size, count=size)
        chosen = self._train[order].tolist()
        return [chosen[start : start + self.plan.micro_batch] for start in range(0, size, self.plan.micro_batch)]

    def held_out_batches(self) -> list[list[int]]:
        """The held-out samples in micro-batches, in an order that no number of ranks changes."""
        size = self.plan.micro_batch
        return [self.held_out[start : start + size] for start in range(0, len(self.held_out), size)]

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """One micro-batch as padded tensors."""
        return collate(indices, self.tokenized, pad_id=self.pad_id)

    def learned(self, indices: Sequence[int]) -> int:
        """Tokens of these samples that have a loss."""
        return learned_tokens(self.tokenized, indices)

    def tokens(self, indices: Sequence[int]) -> int:
        """Tokens of these samples, padding not counted."""
        return sum(span.stop - span.start for span in map(self.tokenized.span, indices))

    def padding(self, indices: Sequence[int]) -> int:
        """Positions of one micro-batch of these samples that hold no token."""
        return len(indices) * width_of(indices, self.tokenized) - self.tokens(indices)


def read_samples(plan: Plan, *, pad_id: int) -> Samples:
    """The data set of the plan, mapped from the token cache; random tokens where the run has none."""
    if plan.data is None or not plan.data.path:
        return Samples(plan, _random_tokens(plan), pad_id=pad_id)
    path = Path(plan.data.path)
    return Samples(plan, load(path, key=path.stem), pad_id=pad_id)


def _random_tokens(plan: Plan) -> TokenizedSet:
    """Full-length random samples, enough for 8 different steps, to try a model's shape without data."""
    count, length = 8 * plan.spec.global_batch, plan.spec.seq_len
    tokens = torch.randint(
        0,
        plan.facts.vocab,
        (count * length,),
        dtype=torch.int32,
        generator=torch.Generator().manual_seed(plan.spec.seed),
    )
    summary = Summary(records=count, dropped=0, truncated=0, tokens=count * length, learned_tokens=count * (length - 1))
    return TokenizedSet(tokens, tokens.clone(), torch.arange(count + 1) * length, summary)


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """The seed of one micro-batch's dropout: the same whichever rank computes it, and after any resume."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {index}".encode()).digest()[:8], "big") >> 1
