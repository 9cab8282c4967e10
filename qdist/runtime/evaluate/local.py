"""How does one process answer scored items, with a model that lies on its devices?"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from qdist.core.errors import SpecError
from qdist.core.evaluation.scoring import CameTo, Item, Scored
from qdist.runtime.engine.head import class_logits, head_rule
from qdist.runtime.engine.objective import hidden_states
from qdist.runtime.model.parts import head_of

BATCH_TOKENS = 4096
"""Tokens of a batch, padding included, unless an item alone is longer."""
_CHUNK_BYTES = 64 << 20
"""Bytes of float32 logits that are held at a time."""


class LocalScorer:
    """Scores items with a whole model in this process. Any causal transformers or PEFT model, in evaluation mode.

    longest: most tokens of an item. batch_tokens: tokens of a batch; 0 scores items one by one.
    """

    def __init__(self, model: Any, *, longest: int, batch_tokens: int = BATCH_TOKENS) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.longest, self._batch_tokens = longest, batch_tokens

    def score(self, items: Sequence[Item], came_to: CameTo) -> list[Scored]:
        """The answers to all items, in their order. Raises SpecError for an item that is too long."""
        require_length(items, self.longest)
        answers: dict[int, Scored] = {}
        for batch in batches_by_length(items, self._batch_tokens):
            answers.update(zip(batch, self._answers([items[index] for index in batch]), strict=True))
            came_to(len(answers))
        return [answers[index] for index in range(len(items))]

    @torch.no_grad()
    def _answers(self, items: Sequence[Item]) -> list[Scored]:
        inputs = padded_right([item.tokens for item in items]).to(self.model.device)
        return answers_of(self.model, hidden_states(self.model, inputs), items)


def require_length(items: Sequence[Item], longest: int) -> None:
    """Raise SpecError if an item has more than `longest` tokens."""
    most = max((len(item.tokens) for item in items), default=0)
    if most > longest:
        raise SpecError(f"an item has {most:,} tokens, and the model takes {longest:,}", try_="shorter items")


def batches_by_length(items: Sequence[Item], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of items by batch, the longest first: memory runs out at once or never."""
    order = sorted(range(len(items)), key=lambda index: (-len(items[index].tokens), index))
    start = 0
    while start < len(order):
        width = max(1, len(items[order[start]].tokens))
        stop = start + max(1, batch_tokens // width)
        yield order[start:stop]
        start = stop


def padded_right(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids, int64 [rows, longest]; zeros behind each row, which causal attention lets no token see."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64)


@torch.no_grad()
def answers_of(model: Any, hidden: torch.Tensor, items: Sequence[Item]) -> list[Scored]:
    """The answers to the items of a batch, from hidden states after the final norm.

    model: the causal model, for its head. hidden: [items, length, hidden], padded on the right.
    """
    width = hidden.shape[1]
    picked = _integers([row * width + at for row, item in enumerate(items) for at in item.positions])
    targets = _integers([target for item in items for target in item.targets])
    at, inverse = picked.unique(return_inverse=True)
    states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, at.to(hidden.device))
    logprobs, greedy = _probabilities(model, states, inverse, targets)
    counts = [len(item.positions) for item in items]
    return [
        Scored(tuple(each.tolist()), tuple(most.tolist()))
        for each, most in zip(logprobs.split(counts), greedy.split(counts), strict=True)
    ]


def _integers(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _probabilities(
    model: Any, states: torch.Tensor, inverse: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log probability, whether the most probable) of each target behind `states[inverse]`, on the CPU."""
    logprobs, greedy = torch.zeros(len(targets)), torch.zeros(len(targets), dtype=torch.bool)
    rows = max(1, _CHUNK_BYTES // (4 * vocabulary(model)))
    for start in range(0, len(states), rows):
        logits = logits_of(model, states[start : start + rows])
        asked = ((inverse >= start) & (inverse < start + rows)).nonzero().flatten()
        row, target = (inverse[asked] - start).to(logits.device), targets[asked].to(logits.device)
        chosen = logits[row, target]
        logprobs[asked] = (chosen - logits.logsumexp(-1)[row]).cpu()
        greedy[asked] = (chosen >= logits.amax(-1)[row]).cpu()
    return logprobs, greedy


def vocabulary(model: Any) -> int:
    """Tokens that a causal model's head tells apart."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def logits_of(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Float32 logits [states, vocabulary] of hidden states [states, hidden] after the final norm."""
    head, rule = head_of(model), head_rule(model)
    states = states.to(next(head.parameters()).device)
    made = rule.of(head(rule.into(states))) if rule.plain else class_logits(model, states[None])[0]
    logits: torch.Tensor = made.float()
    return logits
