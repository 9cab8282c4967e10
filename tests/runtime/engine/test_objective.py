"""The loss is transformers' own, summed; how a batch is cut does not change its gradient."""

from typing import Any

import pytest
import torch

from qdist.runtime.data.batches import collate
from qdist.runtime.data.tokenized import IGNORED
from qdist.runtime.engine.objective import summed_loss
from tests.runtime.tiny import FAMILIES, padded, samples_of, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_is_transformers_mean_times_the_learned_tokens(family: str) -> None:
    model, batch = tiny_model(family), padded([13, 7, 16, 3])
    with torch.no_grad():
        mean = model(**batch).loss
        total = summed_loss(model, batch, fused=False)
    learned = int((batch["labels"][:, 1:] != IGNORED).sum())
    assert float(total) == pytest.approx(float(mean) * learned, rel=1e-5)
    assert float(total) > learned  # not a model that knows the answers


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_counts_for_nothing(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        losses = [summed_loss(model, padded([9, 16], pad_id=pad), fused=False) for pad in (2, 77)]
    assert losses[0] == losses[1]


def test_the_token_behind_a_prompt_is_learned_and_the_first_of_a_sample_never() -> None:
    model = tiny_model()
    tokenized = samples_of([8], prompt=0)
    batch = collate([0], tokenized, pad_id=2)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[0].log_softmax(-1)
        total = summed_loss(model, batch, fused=False)
    wanted = -sum(logits[place, batch["input_ids"][0, place + 1]] for place in range(7))
    assert float(total) == pytest.approx(float(wanted), rel=1e-5)


def test_four_micro_batches_have_the_gradient_of_one_batch() -> None:
    tokenized = samples_of([16, 5, 11, 8, 3, 14, 9, 12])
    learned = tokenized.summary.learned_tokens
    whole, parts = gradients(tokenized, [list(range(8))], learned), gradients(tokenized, PAIRS, learned)
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-6
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-3


PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]


def gradients(tokenized: Any, batches: list[list[int]], learned: int) -> dict[str, torch.Tensor]:
    model = tiny_model()
    for indices in batches:
        (summed_loss(model, collate(indices, tokenized, pad_id=2), fused=False) / learned).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
