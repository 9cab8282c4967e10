"""Stages one behind the other are the whole model, whatever the family and wherever it is cut."""

import copy
from typing import Any

import pytest
import torch

from qdist.core.errors import PlanError
from qdist.runtime.engine.objective import hidden_states, loss_of, summed_loss
from qdist.runtime.placements.split.stages import Absent, keep_stage, layers_of, only_present, spread
from tests.runtime.tiny import FAMILIES, padded, tiny_config, tiny_model

CUTS = [(1, 3), (3, 1), (1, 2, 1), (1, 1, 1, 1)]
MORE = {
    "qwen3": {"head_dim": 16},
    "glm": {"head_dim": 16, "pad_token_id": 2},
    "glm4": {"head_dim": 16, "pad_token_id": 2},
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def four_layers(family: str, **changes: Any) -> Any:
    count = {"n_layer" if family == "bloom" else "num_hidden_layers": 4}
    if family in MORE:
        return tiny_model(family, **{**SHAPE, **MORE[family], **count, **changes})
    return tiny_model(family, **{**count, **changes})


def stages(model: Any, cut: tuple[int, ...]) -> list[Any]:
    made, start = [], 0
    for position, count in enumerate(cut):
        part = copy.deepcopy(model)
        keep_stage(part, range(start, start + count), first=position == 0, last=position == len(cut) - 1)
        made.append(part)
        start += count
    return made


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_stages_one_behind_the_other_are_the_whole_model(family: str, cut: tuple[int, ...]) -> None:
    model, batch = four_layers(family), padded([24, 17, 9])
    with torch.no_grad():
        hidden = batch["input_ids"]
        for part in stages(model, cut):
            hidden = hidden_states(part, hidden)
        assert torch.equal(hidden, hidden_states(model, batch["input_ids"]))
        loss = loss_of(part, hidden, batch, fused=False)
        assert torch.equal(loss, summed_loss(model, batch, fused=False))


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_stages_share_out_the_parameters_under_their_names(family: str) -> None:
    model = four_layers(family)
    whole = dict(model.named_parameters())
    parts = [dict(part.named_parameters()) for part in stages(model, (1, 2, 1))]
    assert set().union(*parts) == set(whole)
    assert all(torch.equal(value, whole[name]) for part in parts for name, value in part.items())
    table = next(name for name, value in whole.items() if value is model.get_input_embeddings().weight)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    twice = [name for name in whole if sum(name in part for part in parts) > 1]
    assert twice == ([table] if tied else [])


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_neox"])
def test_a_model_without_weights_is_cut_as_well(family: str) -> None:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = tiny_config(family, **{"n_layer" if family == "bloom" else "num_hidden_layers": 4})
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    wanted = [set(dict(part.named_parameters())) for part in stages(four_layers(family), (3, 1))]
    assert [set(dict(part.named_parameters())) for part in stages(model, (3, 1))] == wanted
    for part in stages(model, (3, 1)):
        part.tie_weights()
        assert all(parameter.is_meta for parameter in part.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_first_stage_learns_from_what_comes_back(family: str) -> None:
    model, batch = four_layers(family), padded([24, 17, 9])
    summed_loss(model, batch, fused=False).backward()
    one, two = stages(model, (2, 2))
    for part in (one, two):
        part.zero_grad(set_to_none=True)
    sent = hidden_states(one, batch["input_ids"])
    received = sent.detach().requires_grad_()
    loss_of(two, hidden_states(two, received), batch, fused=False).backward()
    sent.backward(received.grad)
    gradients = {name: value.grad for part in (one, two) for name, value in part.named_parameters()}
    assert all(torch.equal(value.grad, gradients[name]) for name, value in model.named_parameters())


def test_who_patches_a_stage_sees_the_layers_that_are_there() -> None:
    (_, middle, _), batch = stages(four_layers("llama"), (1, 2, 1)), torch.randn(2, 8, 64)
    before = hidden_states(middle, batch)
    with only_present(middle):
        assert len(middle.model.layers) == 2
        assert not any(isinstance(layer, Absent) for layer in middle.model.layers)
        middle.model.norm.forward = lambda hidden: hidden * 0  # as Liger does
    assert [isinstance(layer, Absent) for layer in middle.model.layers] == [True, False, False, True]
    assert torch.equal(hidden_states(middle, batch), before)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_a_model_spread_over_devices_computes_the_same(family: str) -> None:
    model, batch = four_layers(family), padded([24, 17, 9])
    with torch.no_grad():
        wanted = summed_loss(model, batch, fused=False)
        spread(model, [torch.device("cpu", 0), *[torch.device("cpu")] * 3])
        assert torch.equal(summed_loss(model, batch, fused=False), wanted)


@pytest.mark.parametrize("layer_map", [(0, 0, 2, 2), (0, 1, 0, 2)])
def test_a_layer_map_gives_every_stage_one_run_of_layers(layer_map: tuple[int, ...]) -> None:
    class _Plan:
        gpus_per_group = 3

    _Plan.layer_map = layer_map  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match="position"):
        [layers_of(_Plan(), position) for position in range(3)]  # type: ignore[arg-type]
