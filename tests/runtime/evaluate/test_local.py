"""Probabilities of one process are those of a plain loop over transformers."""

from typing import Any

import pytest
import torch

from qdist.core.errors import SpecError
from qdist.core.evaluation.scoring import Item, continuation
from qdist.runtime.engine import objective
from qdist.runtime.engine.objective import unseen
from tests.runtime.evaluate.local_scorer import LocalScorer
from tests.runtime.tiny import tiny_model

ITEMS = [
    Item((5, 9, 200), (0, 1, 2), (9, 200, 17)),
    Item((7,), (0, 0, 0, 0), (1, 2, 3, 4)),
    continuation(range(3, 60), (8, 9), longest=64),
    continuation((5, 9), (200,), longest=64),
    Item((4, 4, 4, 4, 4, 4), (5, 0), (300, 4)),
    Item((6, 6), (), ()),
]


@torch.no_grad()
def plain(model: Any, item: Item) -> list[tuple[float, bool]]:
    """What transformers makes of an item alone."""
    logits = model(torch.tensor([item.tokens])).logits[0].float()
    logprobs = logits.log_softmax(-1)
    return [
        (float(logprobs[at, target]), int(logits[at].argmax()) == target)
        for at, target in zip(item.positions, item.targets, strict=True)
    ]


@pytest.mark.parametrize("changes", [{}, {"family": "gemma2", "final_logit_softcapping": 2.0}, {"family": "granite"}])
@pytest.mark.parametrize("positions", [1, 64, 4096])
def test_items_are_answered_in_their_order_as_by_transformers_one_by_one(
    changes: dict[str, Any], positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "_AT_A_TIME", 3)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "logits_scaling": 4.0} if changes else {}
    model = tiny_model(**({**sizes, **more, **changes} if changes else {}))
    done: list[int] = []
    scored = LocalScorer(model, longest=64, positions=positions).score(ITEMS, done.append)
    for item, found in zip(ITEMS, scored, strict=True):
        wanted = plain(model, item)
        assert found.logprobs == pytest.approx([logprob for logprob, _ in wanted], abs=1e-5)
        assert list(found.greedy) == [greedy for _, greedy in wanted]
    assert done[-1] == len(ITEMS)
    assert done == sorted(set(done))


def test_the_most_probable_target_is_greedy() -> None:
    model = tiny_model()
    best = int(model(torch.tensor([[5, 9]])).logits[0, 1].argmax())
    (found,) = LocalScorer(model, longest=8).score([Item((5, 9), (1, 1), (best, best + 1))], unseen)
    assert found.greedy == (True, False)


def test_an_item_longer_than_the_model_takes_is_refused() -> None:
    with pytest.raises(SpecError, match="an item has 9 tokens, and the model takes 8"):
        LocalScorer(tiny_model(), longest=8).score([Item(tuple(range(9)), (0,), (1,))], unseen)


def test_nothing_asked_is_nothing_answered() -> None:
    assert LocalScorer(tiny_model(), longest=8).score([], unseen) == []
