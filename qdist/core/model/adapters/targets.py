"""Which modules does an adapter's configuration name, so that it fits the whole model and nothing else in it?"""

import re
from collections.abc import Collection

from qdist.core.model.shapes import Linear, ModelFacts


def target_modules(facts: ModelFacts, targets: tuple[str, ...], without: Collection[str] = ()) -> list[str] | str:
    """PEFT's `target_modules`: leaf names if they tell the linears from all else, otherwise a regular expression.

    Towers of the whole model, left out here or not, have linears of the same names, and PEFT, like servers, would put
    an adapter on them. without: names of linears that it has as parameters instead.
    """
    linears = [linear for linear in facts.targeted(targets) if linear.name not in without]
    numbers = any(linear.name.isdecimal() for linear in linears)  # of a Sequential, and of the layers themselves
    beside = facts.left_out or facts.outer_parameters
    if not beside and not numbers and not any(linear.within for linear in linears):
        return sorted({linear.name for linear in linears})
    return f"{_in_layers(facts)}(?:{'|'.join(sorted({_path(linear) for linear in linears}))})"


def excluded_modules(facts: ModelFacts, targets: tuple[str, ...]) -> str | None:
    """PEFT's `exclude_modules`: what is kept in 16 bits under the name of a linear that has an adapter; else None."""
    names = {linear.name for linear in facts.targeted(targets) if not linear.within}
    kept = [{own.path for own in shape.kept if own.path.rpartition(".")[2] in names} for shape in facts.shapes]
    common = {path for own, shape in zip(kept, facts.shapes, strict=True) if shape.linears for path in own}
    found = [_excluded(_in_layers(facts), common)] if common else []
    for layer, run in enumerate(facts.run_of_layer):  # other layers may have an adapter where one without linears keeps
        if own := kept[run] - common:
            found.append(_excluded(f"{re.escape(facts.modules.layers)}\\.{layer}\\.", own))
    return "|".join(found) or None


def _excluded(layers: str, paths: Collection[str]) -> str:
    return f"{layers}(?:{'|'.join(map(re.escape, sorted(paths)))})"


def _in_layers(facts: ModelFacts) -> str:
    return f"{re.escape(facts.modules.layers)}\\.\\d+\\."


def _path(linear: Linear) -> str:
    within = f"{re.escape(linear.within)}\\." if linear.within else r"(?:\w+\.)*"
    return within + re.escape(linear.name)
