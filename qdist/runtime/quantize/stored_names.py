"""Which stored tensors make each parameter of a class? transformers' own renamings and conversions, one at a time.

Checkpoints of the hub have other names than transformers' classes: experts one by one, gate and up apart, another
prefix. transformers holds that as data, `get_model_conversion_mapping`, and applies it while it loads a whole
model. Here the same objects are applied to the tensors of one parameter, or to those of one of its experts.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch

Values = Mapping[str, list[torch.Tensor]]
"""Tensors by the pattern of a conversion that their names match, each list in transformers' order."""


class Recipe(NamedTuple):
    """How tensors under other names are made of some that are there, all by one conversion."""

    first: str
    """What transformers calls the conversion by: the first tensor that it makes."""
    parts: dict[str, tuple[str, ...]]
    """Names of what it is made of, by the conversion's pattern."""
    converter: Any = None
    """transformers' `WeightConverter`; None for one tensor under another name."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Every name that it is made of."""
        return tuple(name for names in self.parts.values() for name in names)

    def take(self, index: int | None) -> dict[str, tuple[str, ...]]:
        """Names of one expert, or of all."""
        if index is None:
            return self.parts
        return {pattern: (names[index],) for pattern, names in self.parts.items()}

    def with_part(self, pattern: str, name: str) -> "Recipe":
        """The recipe with one more name."""
        return self._replace(parts={**self.parts, pattern: (*self.parts.get(pattern, ()), name)})


class Recipes:
    """How all tensors of one side are made from those of the other."""

    def __init__(self, model: Any, recipes: Mapping[str, Recipe], unused: Collection[str] = ()) -> None:
        """model: the class, on the meta device. unused: as the field says."""
        self._model, self._recipes = model, recipes
        self.unused = unused
        """What transformers would call the stored tensors that belong to no parameter."""

    def __iter__(self) -> Iterator[Recipe]:
        return iter(self._recipes.values())

    def make(self, recipe: Recipe, values: Values) -> dict[str, torch.Tensor]:
        """What a recipe makes, by name; meta tensors give meta tensors."""
        if recipe.converter is None:
            return {recipe.first: next(iter(values.values()))[0]}
        converter = deepcopy(recipe.converter)
        for pattern, parts in values.items():
            for key, part in zip(recipe.parts[pattern], parts, strict=False):
                converter.add_tensor(recipe.first, key, pattern, part)
        made = converter.convert(recipe.first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def outlines(self, outline: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, Recipe, torch.Tensor]]:
        """Each tensor that can be made, its recipe, and a meta tensor of its shape and dtype.

        outline: a meta tensor for a name that recipes are made of.
        """
        for recipe in self:
            values = {pattern: [outline(name) for name in names] for pattern, names in recipe.parts.items()}
            for name, made in self.make(recipe, values).items():
                yield name, recipe, made


def reading(
    model: Any, stored: Collection[str], *, extra: Collection[str] = (), fp8: Mapping[str, Any] | None = None
) -> Recipes:
    """How the parameters of a class are made from stored tensors, as transformers' `from_pretrained` does it.

    model: on the meta device. extra: names that count as the class's.
    fp8: config.json's `quantization_config` of weights in FP8, which are dequantized.
    """
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    renamings, converters, by_pattern = _sorted(_conversions(model, fp8))
    own = {**model.state_dict(), **dict.fromkeys(extra, True)}
    prefix = model.base_model_prefix
    recipes: dict[str, Recipe] = {}
    unused: list[str] = []
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        if name not in own:
            unused.append(name)
        else:
            _add(recipes, name, key, pattern, by_pattern)
    return Recipes(model, recipes, unused)


def writing(model: Any, own: Collection[str]) -> Recipes:
    """How the tensors of a checkpoint are made from a class's parameters, as its `save_pretrained` does it.

    model: on the meta device. own: names of the parameters that are written.
    Raises NotImplementedError for a conversion that transformers does not reverse.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, dot_natural_key, rename_source_key

    # As for any model that was not read from a folder, whose prefix would be the folder's.
    forward = [
        each for each in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(each, PrefixChange)
    ]
    renamings, converters, by_pattern = _sorted([each.reverse_transform() for each in reversed(forward)])
    recipes: dict[str, Recipe] = {}
    for key in sorted(own, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, reverse=True)
        _add(recipes, name, key, pattern, by_pattern)
    return Recipes(model, recipes)


def _add(recipes: dict[str, Recipe], name: str, key: str, pattern: str | None, by_pattern: Mapping[str, Any]) -> None:
    """Note that the tensor `key` is a part of what makes `name`."""
    if pattern is None:
        recipes.setdefault(name, Recipe(name, {"": (key,)}))
    else:
        recipes[name] = recipes.get(name, Recipe(name, {}, by_pattern[pattern])).with_part(pattern, key)


def _sorted(transforms: list[Any]) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Renamings, conversions, and the conversion of each pattern."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    return [each for each in transforms if isinstance(each, WeightRenaming)], converters, by_pattern


def _conversions(model: Any, fp8: Mapping[str, Any] | None = None) -> list[Any]:
    """transformers' renamings and conversions from a checkpoint to a model, in its order.

    fp8: config.json's `quantization_config` of weights that are dequantized.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    if fp8 is None:
        return list(get_model_conversion_mapping(model))
    from transformers import FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    settings = FineGrainedFP8Config.from_dict({**fp8, "dequantize": True})
    quantizer = FineGrainedFP8HfQuantizer(settings, pre_quantized=True)
    return list(get_model_conversion_mapping(model, hf_quantizer=quantizer))
