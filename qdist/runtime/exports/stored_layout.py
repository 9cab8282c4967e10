"""Under which names, and from what, does a model's `save_pretrained` write the weights of its class?

Experts one by one and in the names of the hub where transformers converts them while it loads: so other programs, such
as vLLM and llama.cpp's converter, find what they look for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from qdist.core.model.shapes import Experts
from qdist.runtime.formats.packed_folder import Entry
from qdist.runtime.quantize.stored_names import Recipe, Recipes, reading, writing


class OfExpert(NamedTuple):
    """A stored tensor that is rows of one expert's matrix."""

    name: str
    parameter: str
    expert: int
    rows: torch.Tensor
    """Indices of its rows in the matrix, in their order."""

    @property
    def module(self) -> str:
        """The path of the linear that it would be the weight of."""
        return self.name.removesuffix(".weight")


MatrixOf = Callable[[str, int], torch.Tensor]
"""The matrix of an expert in a parameter, as the class holds it."""


def expert_parts(model: Any, experts: Mapping[str, Experts]) -> dict[str, tuple[OfExpert, ...]]:
    """For each parameter of experts that is stored an expert at a time, the tensors that it is stored as.

    model: the class, on the meta device. experts: by the paths of their modules.
    """
    parameters = parameters_of(experts)
    recipes = writing(model, parameters)
    found = {name: _parts(recipes, recipe, parameters) for recipe in recipes for name in recipe.sources}
    return {name: parts for name, parts in found.items() if parts}


def parameters_of(experts: Mapping[str, Experts]) -> dict[str, tuple[int, int, int]]:
    """The shape of each parameter of experts, as its class holds it."""
    return {
        f"{path}.{each.name}": (own.count, each.inputs, each.outputs)
        if own.transposed
        else (own.count, each.outputs, each.inputs)
        for path, own in experts.items()
        for each in own.matrices
    }


def _parts(recipes: Recipes, recipe: Recipe, parameters: Mapping[str, tuple[int, int, int]]) -> tuple[OfExpert, ...]:
    """What a recipe makes of one parameter of experts; empty unless each is rows of one expert's matrix.

    The recipe is applied to the rows' own numbers: so halves, interleaved or not, need no rule here.
    """
    if recipe.converter is None or len(recipe.sources) != 1 or recipe.sources[0] not in parameters:
        return ()
    ((pattern, (parameter,)),) = recipe.parts.items()
    count, rows, columns = parameters[parameter]
    numbers = torch.arange(count * rows).view(count, rows, 1)
    whole = torch.empty(count, rows, columns, device="meta")
    shapes = {name: value.shape for name, value in recipes.make(recipe, {pattern: [whole]}).items()}
    found = []
    for name, made in recipes.make(recipe, {pattern: [numbers]}).items():
        flat = made.reshape(-1)
        expert = int(flat[0]) // rows
        if shapes[name] != (len(flat), columns) or bool((flat // rows != expert).any()):
            return ()
        found.append(OfExpert(name, parameter, expert, flat % rows))
    return tuple(found)


def as_stored(
    entries: Sequence[Entry], model: Any, experts: Mapping[str, Experts], matrix: MatrixOf
) -> Iterator[tuple[Entry, Entry]]:
    """What is written in place of each of a class's tensors, with the tensor that it is made of.

    The class's own names stay where transformers would not make the same tensors of what is written.
    model: the class, on the meta device.
    """
    own = {entry.name: entry for entry in entries}
    outlines = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in own.items()}
    recipes = writing(model, own)
    written = [*recipes.outlines(outlines.__getitem__)]
    if not _is_read_back(model, outlines, {name: made for name, _, made in written}):
        yield from ((entry, entry) for entry in entries)
        return
    parts = {part.name: part for each in expert_parts(model, experts).values() for part in each}
    for name, recipe, made in written:
        source = own[recipe.sources[0]]
        if name in parts:
            make: Callable[[], torch.Tensor] = partial(_rows_of, matrix, parts[name])
        else:
            make = partial(_made, recipes, recipe, own, name)
        yield Entry(name, source.dtype, tuple(made.shape), make), source


def _rows_of(matrix: MatrixOf, part: OfExpert) -> torch.Tensor:
    whole = matrix(part.parameter, part.expert)
    return whole[part.rows.to(whole.device)]


def _made(recipes: Recipes, recipe: Recipe, own: Mapping[str, Entry], name: str) -> torch.Tensor:
    values = {pattern: [own[each].make() for each in names] for pattern, names in recipe.parts.items()}
    return recipes.make(recipe, values)[name]


def _is_read_back(model: Any, own: Mapping[str, torch.Tensor], written: Mapping[str, torch.Tensor]) -> bool:
    """Whether transformers makes tensors of the class's names and sizes from what would be written."""
    back = reading(model, written, extra=own).outlines(written.__getitem__)
    sizes = {name: made.shape for name, _, made in back}
    return sizes == {name: outline.shape for name, outline in own.items()}
