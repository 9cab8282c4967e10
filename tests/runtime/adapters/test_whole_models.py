"""An adapter trained on the text model alone, or on linears in the place of Conv1D, fits the whole plain model."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from qdist.core.model.adapters.targets import excluded_modules, target_modules
from qdist.core.model.shapes import Kept, LayerRun, LayerShape, Linear, ModelFacts
from qdist.core.planning.plan import Plan
from qdist.runtime.adapters.attach import add_adapter
from qdist.runtime.model.parts import decoder_layers, find_parts
from qdist.runtime.model.skeleton import fill, skeleton
from qdist.runtime.model.weights import ModelWeights
from qdist.runtime.train.result import peft_name, write_beside
from tests.runtime.every_model import tiny_model
from tests.runtime.tiny import plan_of, save_config

TOWERS = ("vision_tower", "visual", "multi_modal_projector")
SMALL = 32
"""Outputs below which a linear is kept in 16 bits here."""


def facts_of(model: Any, family: str) -> ModelFacts:
    """Facts by walking a model's layers; all linears as inputs of an MLP, since nothing is planned with them."""
    return ModelFacts(
        name=family,
        family=family,
        layers=tuple(LayerRun(shape_of(layer), 1) for layer in decoder_layers(model)),
        vocab=320,
        max_positions=128,
        tied_embeddings=False,
        modules=find_parts(model),
        left_out=tuple(Kept(f"model.{name}", 1, "tower") for name in TOWERS if hasattr(model.base_model, name)),
    )


def shape_of(layer: nn.Module) -> LayerShape:
    linears, kept = [], []
    for path, module in layer.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        within, _, leaf = path.rpartition(".")
        transposed = isinstance(module, Conv1D)
        outputs, inputs = reversed(module.weight.shape) if transposed else module.weight.shape
        if outputs < SMALL:
            kept.append(Kept(path, module.weight.numel(), "too small to pack"))
            continue
        clear = within if leaf in ("c_proj", "out_proj") else ""
        linears.append(Linear(leaf, inputs, outputs, module.bias is not None, "mlp_in", clear, transposed))
    return LayerShape(
        hidden=64, linears=tuple(linears), intermediate=128, heads=4, kv_heads=2, head_dim=16, kept=tuple(kept)
    )


def planned(model: Any, family: str, folder: Path, **settings: Any) -> Plan:
    plan = plan_of(save_config(folder / "llama"), folder / "run", **settings)
    source = msgspec.structs.replace(plan.source, config={**model.config.to_dict(), "model_type": family})
    return msgspec.structs.replace(plan, facts=facts_of(model, family), source=source)


def text_only(whole: Any) -> Any:
    model = copy.deepcopy(whole)
    for name in TOWERS:
        if hasattr(model.base_model, name):
            setattr(model.base_model, name, None)
    return model


def trained(model: Any, plan: Plan, folder: Path) -> Any:
    """The adapted model with random numbers in place of training, its adapter written to a folder."""
    adapted = add_adapter(model, plan)
    generator = torch.Generator().manual_seed(3)
    parameters = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    for value in parameters.values():
        value.data.normal_(0.0, 0.1, generator=generator)
    write_beside(folder, plan)
    tensors = {peft_name(name): value.detach().clone() for name, value in parameters.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return adapted.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "qwen3_5", "llama", "falcon", "jamba"])
def test_an_adapter_of_the_text_model_fits_the_whole_model(family: str, tmp_path: Path) -> None:
    whole = tiny_model(family)
    plan = planned(whole, family, tmp_path)
    (tmp_path / "adapter").mkdir()
    adapted = trained(text_only(whole).requires_grad_(False), plan, tmp_path / "adapter")
    paths = [
        path.removeprefix("base_model.model.") for path, each in adapted.named_modules() if hasattr(each, "lora_A")
    ]
    assert sorted(paths) == sorted(path for path, _ in whole.named_modules() if plan.facts.packs(path))
    plain = PeftModel.from_pretrained(copy.deepcopy(whole), str(tmp_path / "adapter")).eval()
    assert sum(hasattr(each, "lora_A") for each in plain.modules()) == len(paths)
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=1e-4, atol=1e-5)
    assert float((logits(plain) - logits(whole)).abs().max()) > 1e-3


@pytest.mark.parametrize("bits", [16, 4])
def test_an_adapter_on_linears_in_the_place_of_conv1d_fits_them(bits: int, tmp_path: Path) -> None:
    whole = tiny_model("gpt2")
    plan = planned(whole, "gpt2", tmp_path, bits=bits)
    made = skeleton(plan.source, bits=bits, quant=plan.spec.quant, dtype=torch.float32, facts=plan.facts)
    fill(made, ModelWeights(whole, device=torch.device("cpu"), dtype=torch.float32), device=torch.device("cpu"))
    linear = made.transformer.h[0].attn.c_attn
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (64, 192)
    if bits == 4:  # what the packed weights stand for is the judge
        for path, module in whole.named_modules():
            if isinstance(module, Conv1D):
                packed = made.get_submodule(path).matrix(torch.float32, torch.device("cpu"))
                weight = module.weight.detach()
                assert float((packed.t() - weight).abs().max()) < 0.2 * float(weight.abs().max())
                module.weight.data.copy_(packed.t())
    torch.testing.assert_close(logits(made), logits(whole), rtol=1e-4, atol=1e-5)
    (tmp_path / "adapter").mkdir()
    adapted = trained(made, plan, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["fan_in_fan_out"] is True
    plain = PeftModel.from_pretrained(copy.deepcopy(whole), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=1e-4, atol=1e-5)
    merged = adapted.merge_and_unload() if bits == 16 else plain.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(plain), rtol=1e-4, atol=1e-5)


def test_names_are_leaves_where_they_tell_enough_and_whole_paths_elsewhere() -> None:
    plain = facts_of(tiny_model("llama"), "llama")
    assert target_modules(plain, ("q_proj", "v_proj")) == ["q_proj", "v_proj"]
    assert excluded_modules(plain, ("all-linear",)) is None
    numbered = tuple(LayerRun(numbers_of(run.shape), run.count) for run in plain.layers)
    found = target_modules(msgspec.structs.replace(plain, layers=numbered), ("0",))
    assert re.fullmatch(str(found), "model.layers.0.ffn.0")
    assert not re.fullmatch(str(found), "model.layers.0")
    wrapper = msgspec.structs.replace(plain, left_out=(Kept("model.vision_tower", 1, "tower"),))
    assert target_modules(wrapper, ("q_proj", "v_proj")) == (
        r"model\.layers\.\d+\.(?:(?:\w+\.)*q_proj|(?:\w+\.)*v_proj)"
    )
    beside = msgspec.structs.replace(plain, outer_parameters=1)  # a tower that is loaded, as in Phi-4-multimodal
    assert target_modules(beside, ("q_proj",)) == r"model\.layers\.\d+\.(?:(?:\w+\.)*q_proj)"


def numbers_of(shape: LayerShape) -> LayerShape:
    """The layer with its linears in a Sequential, whose names are numbers as those of the layers are."""
    linears = (msgspec.structs.replace(linear, name=str(at)) for at, linear in enumerate(shape.linears))
    return msgspec.structs.replace(shape, linears=tuple(linears))


def test_what_is_kept_under_a_linears_name_is_excluded() -> None:
    facts = facts_of(tiny_model("llama"), "llama")
    run = facts.layers[0]
    kept = msgspec.structs.replace(run.shape, kept=(Kept("mamba.o_proj", 1, "read by a fused kernel"),))
    mixed = msgspec.structs.replace(facts, layers=(msgspec.structs.replace(run, shape=kept), *facts.layers[1:]))
    assert excluded_modules(mixed, ("all-linear",)) == r"model\.layers\.\d+\.(?:mamba\.o_proj)"
    assert excluded_modules(mixed, ("q_proj",)) is None


def test_what_only_some_layers_keep_is_excluded_there_alone() -> None:
    facts = facts_of(tiny_model("llama"), "llama")
    run, *_ = facts.layers
    skipped = msgspec.structs.replace(run.shape, linears=(), kept=(Kept("mlp.up_proj", 1, "skipped"),))
    layers = (LayerRun(run.shape, 1), LayerRun(skipped, 1))
    mixed = msgspec.structs.replace(facts, layers=layers)
    assert excluded_modules(mixed, ("all-linear",)) == r"model\.layers\.1\.(?:mlp\.up_proj)"
