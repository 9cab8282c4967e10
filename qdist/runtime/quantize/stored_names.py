"""Which stored tensors make each parameter of a class? transformers' own renamings and conversions, one at a time.

Checkpoints of the hub have other names than transformers' classes: experts one by one, gate and up apart, another
prefix. transformers holds that as data, `get_model_conversion_mapping`, and applies it while it loads a whole model.
Here the same objects are applied to the tensors of one parameter, or to those of one of its experts.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch

Values = Mapping[str, list[torch.Tensor]]
"""Tensors by the pattern of a conversion that their stored names match, each list in transformers' order."""


class Recipe(NamedTuple):
    """How one parameter, or several of one conversion, are made from stored tensors."""

    first: str
    """The parameter that transformers calls the conversion by: the first of those that it makes."""
    parts: dict[str, tuple[str, ...]]
    """Stored names by the conversion's pattern."""
    converter: Any = None
    """transformers' `WeightConverter`; None for one stored tensor under another name."""

    @property
    def stored(self) -> tuple[str, ...]:
        """Every stored name."""
        return tuple(name for names in self.parts.values() for name in names)

    def take(self, index: int | None) -> dict[str, tuple[str, ...]]:
        """Stored names of one expert, or of all."""
        if index is None:
            return self.parts
        return {pattern: (names[index],) for pattern, names in self.parts.items()}


class Recipes:
    """The recipes of a class for a set of stored names."""

    def __init__(
        self,
        model: Any,
        stored: Collection[str],
        *,
        extra: Collection[str] = (),
        quantization: Mapping[str, Any] | None = None,
    ) -> None:
        """model: on the meta device. extra: names that count as the class's.

        quantization: what config.json says of weights in FP8, which are dequantized.
        """
        self._model = model
        self.by_name: dict[str, Recipe] = {}
        """The recipe by the parameter that it is called by."""
        self.unused: dict[str, str] = {}
        """Stored names that belong to no parameter, by what transformers would call them."""
        self._collect(stored, {**model.state_dict(), **dict.fromkeys(extra, True)}, quantization)

    def _collect(self, stored: Collection[str], own: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        transforms = conversions_of(self._model, quantization)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        prefix = self._model.base_model_prefix
        for key in sorted(stored, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, own)
            if name not in own and key in own:
                name, pattern = rename_source_key(key, [], [], prefix, own)
            if name not in own:
                self.unused[name] = key
            elif pattern is None:
                self.by_name.setdefault(name, Recipe(name, {"": (key,)}))
            else:
                recipe = self.by_name.setdefault(name, Recipe(name, {}, by_pattern[pattern]))
                recipe.parts[pattern] = (*recipe.parts.get(pattern, ()), key)

    def make(self, recipe: Recipe, values: Values) -> dict[str, torch.Tensor]:
        """The parameters that a recipe makes of its stored tensors, by name; meta tensors give meta tensors."""
        if recipe.converter is None:
            return {recipe.first: next(iter(values.values()))[0]}
        converter = deepcopy(recipe.converter)
        for pattern, parts in values.items():
            for key, part in zip(recipe.parts[pattern], parts, strict=False):
                converter.add_tensor(recipe.first, key, pattern, part)
        made = converter.convert(recipe.first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def outlines(self, outline: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, Recipe, torch.Tensor]]:
        """Each parameter that can be made, its recipe, and a meta tensor of its shape and dtype.

        outline: a meta tensor for a stored name.
        """
        for recipe in self.by_name.values():
            values = {pattern: [outline(name) for name in names] for pattern, names in recipe.parts.items()}
            for name, made in self.make(recipe, values).items():
                yield name, recipe, made


def conversions_of(model: Any, fp8: Mapping[str, Any] | None = None) -> list[Any]:
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
