"""Are machines of different cards planned, and does plain transformers take the `device_map` of such a plan?"""

from pathlib import Path
from typing import Any

import pytest
import torch

from qdist.core.errors import SpecError
from qdist.core.machine.cards import described
from qdist.core.model.families import from_config
from qdist.core.planning.candidates import USABLE_SHARE
from qdist.core.planning.device_map import device_map
from qdist.core.planning.plan import Plan, Source
from qdist.core.planning.planner import make_plan
from qdist.core.spec.run_spec import memory_cap_of, nest, resolve
from tests.plans import CPU, gpus, planned
from tests.runtime.tiny import FAMILIES, tiny_config, tiny_model

CAPPED = {"gpu_memory": "2x24GiB"}
MIXED: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({"gpu_name": "RTX 3090 + RTX 4090"}, {}),
    ({"gpu_memory": "2x24GiB + 48GiB"}, {"global_batch": 24}),
    (CAPPED, {"max_memory": "0=23GiB,1=19GiB"}),
    (CAPPED, {"max_memory": "20GiB,1=24GiB", "split.schedule": "sequential"}),
    ({"gpu_name": "A10 + RTX 5090 + L40S"}, {"global_batch": 24}),
]


def plan_of(cards: dict[str, str], settings: dict[str, Any], model: str = "llama-65b") -> Plan:
    return planned(model, described(gpus=None, **{"gpu_name": None, "gpu_memory": None, **cards}), settings)


def placed(plan: Plan, parameters: set[str]) -> dict[str, int | str]:
    """The device of each parameter, which exactly one module of the map holds."""
    modules = device_map(plan)
    found = {}
    for name in parameters:
        (found[name],) = (device for path, device in modules.items() if name.startswith(f"{path}."))
    return found


@pytest.mark.parametrize(("cards", "settings"), MIXED)
@pytest.mark.parametrize("placement", [{}, {"placement": "split"}])
def test_different_cards_are_planned_each_within_its_own_memory(
    cards: dict[str, str], settings: dict[str, Any], placement: dict[str, str]
) -> None:
    plan = plan_of(cards, settings | placement)
    totals = [gpu.total_bytes for gpu in described(gpus=None, **{"gpu_name": None, "gpu_memory": None, **cards}).gpus]
    assert plan.tokens_per_second > 0
    for rank in plan.ranks:
        for gpu, own in zip(rank.gpus, rank.expected, strict=True):
            assert own.required <= USABLE_SHARE * min(totals[gpu], memory_cap_of(plan.spec, gpu) or totals[gpu])
    if plan.placement == "split":
        assert {gpu for rank in plan.ranks for gpu in rank.gpus} == set(range(len(totals)))


@pytest.mark.parametrize(("cards", "settings"), MIXED)
def test_plain_transformers_loads_by_the_device_map_of_a_split_over_different_cards(
    tmp_path: Path, cards: dict[str, str], settings: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    plan = plan_of(cards, settings | {"placement": "split"})
    model = tiny_model(num_hidden_layers=80)
    model.save_pretrained(tmp_path)
    devices = placed(plan, set(model.state_dict()))
    order = [devices[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(80)]
    visited = [gpu for rank in plan.ranks for gpu in rank.gpus]
    assert [gpu for gpu in order if gpu != "cpu"] == [
        visited[position] for layer, position in enumerate(plan.layer_map) if layer not in plan.offloaded_layers
    ]
    on_cpu = dict.fromkeys(device_map(plan), "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=on_cpu)
    assert {name for name, value in loaded.named_parameters() if value.device.type != "cpu"} == set()
    tokens = torch.tensor([[3, 5, 7]])
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_names_every_parameter_of_every_family(family: str) -> None:
    config = tiny_config(family)
    plan = make_plan(
        resolve(nest({"steps": 1, "model": family, "seq_len": 16, "placement": "split"})),
        Source(kind="dummy", path="", config=config, tokenizer=""),
        from_config(config, name=family),
        gpus(2, 24),
        None,
    )
    with torch.device("meta"):
        devices = placed(plan, set(tiny_model(family).state_dict()))
    assert set(devices.values()) == {0, 1}


def test_layers_in_host_memory_are_mapped_to_the_cpu() -> None:
    plan = planned("llama-65b", gpus(1, 24), {"split.offload_layers": 75})
    modules = device_map(plan)
    assert [modules[f"model.layers.{layer}"] for layer in plan.offloaded_layers] == ["cpu"] * 75
    assert (modules["model.embed_tokens"], modules["lm_head"]) == (0, 0)


def test_a_whole_backbone_is_on_the_first_gpu_or_the_cpu_and_a_sharded_one_has_no_map() -> None:
    assert set(device_map(planned("llama-7b", gpus(2, 80))).values()) == {0}
    assert set(device_map(planned("smollm2-135m", CPU)).values()) == {"cpu"}
    with pytest.raises(SpecError, match="each GPU of a shard has a part of every one"):
        device_map(planned("llama-65b", gpus(4, 24)))
