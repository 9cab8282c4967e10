"""Adapters of experts compute, start and are stored as PEFT's of the same parameters."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from qdist.core.errors import SpecError
from qdist.core.planning.plan import Plan
from qdist.runtime.adapters.attach import adapt, add_adapter, fill_adapter, lora_config
from qdist.runtime.adapters.lora import peft_name
from tests.runtime.model.test_experts import passes, same
from tests.runtime.moe_models import ATTENTION, CONFIGS, facts_of_experts, packed_model, unpacked_twin
from tests.runtime.tiny import plan_of, save_config

TARGETS = {
    "experts": ("experts",),
    "last": ("experts.down_proj",),
    "attention too": (*ATTENTION, "experts"),
}


def config_for(family: str, targets: tuple[str, ...]) -> Any:
    return LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[name for name in targets if name in ATTENTION],
        target_parameters=list(facts_of_experts(family).targeted_parameters(targets)),
    )


def randomized(model: Any) -> Any:
    """The model with adapters that matter, whatever the class of their modules."""
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.train()


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("family", CONFIGS)
def test_adapted_experts_compute_what_peft_does(family: str, targets: tuple[str, ...]) -> None:
    model, config = packed_model(family), config_for(family, targets)
    twin = unpacked_twin(model, family)
    ours, theirs = randomized(adapt(model, copy.copy(config))), randomized(get_peft_model(twin, config))
    assert trained(ours).keys() == trained(theirs).keys()
    assert {name: value.shape for name, value in trained(ours).items()} == {
        name: value.shape for name, value in trained(theirs).items()
    }
    for mine, other in zip(passes(ours), passes(theirs), strict=True):
        same(mine, other)
    for name, parameter in trained(theirs).items():
        assert parameter.grad is not None
        same(trained(ours)[name].grad, parameter.grad)


def test_packed_matrices_of_experts_are_no_linears_of_the_same_name() -> None:
    config = LoraConfig(r=4, target_modules=r".*\.(q_proj|down_proj)", exclude_modules=r".*\.0\.self_attn\.q_proj")
    adapted = adapt(packed_model("qwen3_moe"), config)
    names = {name.partition(".lora_")[0] for name in trained(adapted)}
    assert names
    assert all(name.endswith("1.self_attn.q_proj") for name in names)


def test_a_disabled_adapter_leaves_the_backbone() -> None:
    model = packed_model("mixtral")
    plain = passes(model)[0]
    adapted = randomized(adapt(model, config_for("mixtral", ("experts",))))
    assert not torch.equal(passes(adapted)[0], plain)
    with adapted.disable_adapter():
        same(passes(adapted)[0], plain)


def plan_for(family: str, folder: Path, targets: tuple[str, ...], **settings: Any) -> Plan:
    """A plan of Llama's with the facts of a model with experts."""
    plan = plan_of(save_config(folder / "model"), folder / "run", **settings)
    lora = msgspec.structs.replace(plan.spec.lora, targets=targets)
    return msgspec.structs.replace(
        plan, facts=facts_of_experts(family), spec=msgspec.structs.replace(plan.spec, lora=lora)
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_plain_peft_loads_what_is_stored(family: str, tmp_path: Path) -> None:
    plan = plan_for(family, tmp_path, ("experts",))
    model = packed_model(family)
    twin = unpacked_twin(model, family)
    ours = randomized(add_adapter(model, plan))
    stored = {peft_name(name): value.detach().contiguous() for name, value in trained(ours).items()}
    save_file(stored, tmp_path / "adapter_model.safetensors")
    lora_config(plan).save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(settings["target_parameters"]) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    theirs = PeftModel.from_pretrained(twin, str(tmp_path))
    same(passes(ours.eval())[0], passes(theirs.eval())[0])


def test_initial_matrices_depend_on_seed_and_name_and_change_nothing(tmp_path: Path) -> None:
    plan = plan_for("qwen3_moe", tmp_path, ("experts", "q_proj"))
    model = packed_model("qwen3_moe")
    plain = passes(model)[0]
    ours, again = add_adapter(model, plan), add_adapter(packed_model("qwen3_moe"), plan)
    assert torch.equal(passes(ours)[0], plain)
    values = trained(ours)
    assert all(torch.equal(value, trained(again)[name]) for name, value in values.items())
    downs = {name: value for name, value in values.items() if "experts" in name and ".lora_A." in name}
    assert len(downs) == 4
    for value in downs.values():
        bound = value.shape[1] ** -0.5
        assert float(value.detach().abs().max()) == pytest.approx(bound, rel=0.01)
        assert value.dtype == torch.float32


def test_an_adapter_is_filled_by_the_names_of_its_file() -> None:
    one, other = (adapt(packed_model("mixtral"), config_for("mixtral", TARGETS["attention too"])) for _ in range(2))
    tensors = {peft_name(name): value.detach() for name, value in trained(randomized(one)).items()}
    assert fill_adapter(other, {**tensors, "stranger": torch.zeros(1)}) == ([], ["stranger"])
    assert torch.equal(passes(one)[0], passes(other)[0])
    missing = dict(tensors)
    gone = missing.popitem()[0]
    assert fill_adapter(other, missing) == ([gone], [])


def test_linears_that_peft_takes_for_experts_are_targeted_as_parameters(tmp_path: Path) -> None:
    plan = plan_for("qwen3_moe", tmp_path, ("all-linear",))
    layer = plan.facts.layers[0].shape
    shared = msgspec.structs.replace(layer.linears[0], name="down_proj", within="mlp.shared_experts")
    facts = msgspec.structs.replace(
        plan.facts,
        layers=(
            msgspec.structs.replace(
                plan.facts.layers[0], shape=msgspec.structs.replace(layer, linears=(*layer.linears, shared))
            ),
        ),
    )
    config = lora_config(msgspec.structs.replace(plan, facts=facts))
    assert set(config.target_modules) == set(ATTENTION)
    assert config.target_parameters == ["down_proj.weight"]
    lora = msgspec.structs.replace(plan.spec.lora, dropout=0.1)
    dropped = msgspec.structs.replace(plan, facts=facts, spec=msgspec.structs.replace(plan.spec, lora=lora))
    with pytest.raises(SpecError, match="down_proj in qwen3_moe without dropout alone"):
        lora_config(dropped)


def test_what_is_kept_for_adapters_is_the_hidden_states_and_narrow_products() -> None:
    model = adapt(packed_model("qwen3_moe"), config_for("qwen3_moe", ("experts",)))
    experts = model.base_model.model.model.layers[0].mlp.experts
    kept: list[torch.Tensor] = []
    hidden, weights = torch.randn(5, 64, requires_grad=True), torch.rand(5, 2, requires_grad=True)
    index = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [0, 7]])
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda held: held):
        experts(hidden, index, weights)
    adapter = {parameter.data_ptr() for parameter in trained(model).values()}
    new = [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in adapter]
    assert sorted(new) == [(5, 2), (5, 2), (5, 64), (10, 4), (10, 4), (10, 192)]
    assert any(tensor is hidden for tensor in kept)


@pytest.mark.slow
def test_sharded_experts_compute_what_whole_ones_do(fork_ranks: Callable[..., list[int]], tmp_path: Path) -> None:
    assert fork_ranks("tests.runtime.sharded_experts", 2, tmp_path) == [0, 0]
    found = [json.loads((tmp_path / f"answer-{rank}.json").read_text()) for rank in range(2)]
    assert min(answer["held"] for answer in found) > 0
    assert sum(answer["held"] for answer in found) == found[0]["whole"]
    assert all(answer["worst"] < 1e-5 and answer["checked"] > 100_000 for answer in found)
