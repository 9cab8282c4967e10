"""Masks of whole rows: the same numbers as transformers' own, without reading a value."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig

from qdist.runtime.model.causal import NAME, take_whole_rows, takes_whole_rows, whole_rows

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(params=[(LlamaConfig, {}), (MistralConfig, {"sliding_window": 8}),
                        (Gemma3TextConfig, {"sliding_window": 8})])  # fmt: skip
def model(request: pytest.FixtureRequest) -> Any:
    kind, more = request.param
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**SIZES, **more)).eval()


@torch.no_grad()
@pytest.mark.parametrize("width", [8, 24])
def test_hidden_states_are_those_of_transformers_own_masks(model: Any, width: int) -> None:
    ids = torch.randint(0, 50, (2, width))
    before = model.model(input_ids=ids, use_cache=False)[0]
    take_whole_rows(model)
    after = model.model(input_ids=ids, attention_mask=whole_rows(ids), use_cache=False)[0]
    assert takes_whole_rows(model)
    assert torch.equal(before, after)


@torch.no_grad()
def test_answers_with_padding_and_a_cache_are_as_before(model: Any) -> None:
    ids = torch.randint(1, 50, (2, 12))
    ids[0, :5] = 0
    given = {"attention_mask": (ids != 0).long(), "max_new_tokens": 3, "do_sample": False}
    before = model.generate(ids, **given)
    take_whole_rows(model)
    assert torch.equal(before, model.generate(ids, **given))


def test_eager_attention_is_left_alone(model: Any) -> None:
    model.config._attn_implementation = "eager"
    take_whole_rows(model)
    assert model.config._attn_implementation == "eager" != NAME
