"""Do the facts that a family's file reads without torch name every parameter of transformers' class?"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from qdist.core.model.aliases import ALIASES, config_of
from qdist.core.model.families import FAMILIES, from_config
from qdist.core.model.shapes import LayerShape, Linear, ModelFacts
from qdist.runtime.model.classes import empty_model

NO_CLASS = {alias for alias, model in ALIASES.items() if FAMILIES[model.config["model_type"]].own_code}


@cache
def built(alias: str) -> Any:
    """transformers' class of an alias on meta, made once."""
    return made(config_of(alias))


def made(config: dict[str, Any]) -> Any:
    return empty_model(AutoConfig.for_model(**config))


def linears_of(layer: torch.nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear of a layer by its path, as facts have it, but for what it reads."""
    for path, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            outputs, inputs = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
            yield path, Linear(path.rpartition(".")[2], inputs, outputs, module.bias is not None, "mlp_in")


def check_layer(layer: torch.nn.Module, shape: LayerShape) -> None:
    """Every parameter of a layer is one of a linear, of the experts, of what is kept, or of a norm."""
    left = {name: tuple(weight.shape) for name, weight in layer.named_parameters()}
    kept = {each.path: each.parameters for each in shape.kept}
    for path, count in kept.items():
        names = [name for name in left if name == path or name.startswith(f"{path}.")]
        assert sum(torch.Size(left.pop(name)).numel() for name in names) == count, path
    packed = [(path, linear) for path, linear in linears_of(layer) if path not in kept]
    assert [(linear.name, linear.inputs, linear.outputs, linear.bias) for _, linear in packed] == [
        (linear.name, linear.inputs, linear.outputs, linear.bias) for linear in shape.linears
    ]
    for (path, _), linear in zip(packed, shape.linears, strict=True):
        assert shape.packs(path)
        assert linear.within in ("", path.rpartition(".")[0])
        left = {name: size for name, size in left.items() if not name.startswith(f"{path}.")}
    if shape.experts:
        count, transposed = shape.experts.count, shape.experts.transposed
        for matrix in shape.experts.matrices:
            sizes = (matrix.inputs, matrix.outputs) if transposed else (matrix.outputs, matrix.inputs)
            assert left.pop(f"{shape.experts.path}.{matrix.name}") == (count, *sizes)
            assert left.pop(f"{shape.experts.path}.{matrix.name}_bias", None) == (
                (count, matrix.outputs) if matrix.bias else None
            )
    norms = [(shape.hidden,)] * (shape.norms * (2 if shape.norm == "layer" else 1))
    assert sorted(left.values()) == sorted([*norms, *((width,) for width in shape.qk_norm_widths)])


def check(model: Any, facts: ModelFacts) -> None:
    """Every parameter of a model stands in its facts, layer by layer."""
    modules = facts.modules
    layers = model.get_submodule(modules.layers)
    assert len(layers) == facts.layer_count
    for index, run in enumerate(facts.run_of_layer):
        check_layer(layers[index], facts.shapes[run])
    embedding, head = model.get_submodule(modules.embedding).weight, model.get_submodule(modules.head).weight
    assert tuple(embedding.shape) == tuple(head.shape) == (facts.vocab, facts.hidden)
    assert (embedding is head) == facts.tied_embeddings
    for path in (*modules.before, *modules.added, *modules.shared, modules.final_norm):
        model.get_submodule(path)
    towers = {each.path: each.parameters for each in facts.left_out}
    found = {path: sum(weight.numel() for weight in model.get_submodule(path).parameters()) for path in towers}
    assert found == towers
    assert facts.parameters == sum(weight.numel() for weight in model.parameters()) - sum(towers.values())


@pytest.mark.parametrize("alias", sorted(ALIASES.keys() - NO_CLASS))
def test_facts_of_an_alias_are_those_of_the_class(alias: str) -> None:
    check(built(alias), from_config(config_of(alias), name=alias))
