"""Can a model's layers keep the samples of one packed row apart?"""

from qdist.core.model.families import FAMILIES
from qdist.core.model.shapes import LayerShape, ModelFacts
from qdist.core.planning.activations import has_sinks

_WIDEST_HEAD = 256
"""What flash attention computes; wider heads would take scores of the whole row, square in its length."""


def packs_samples(facts: ModelFacts) -> str:
    """Why samples of a model cannot share a row, to follow its name; empty if they can.

    tests/runtime/model/test_apart.py compares each family that can with rows of single samples.
    """
    family = FAMILIES.get(facts.family)
    if family is None:
        return "is of a type whose attention nobody has seen to keep samples apart"
    if family.own_code:
        return "comes with code of its own, whose attention does not know where samples end"
    return next(filter(None, map(_why_not, facts.shapes)), "")


def _why_not(shape: LayerShape) -> str:
    if shape.mixer != "attention":
        return "has layers whose state would run from one sample into the next"
    if has_sinks(shape):
        return "has attention sinks, which no kernel for several samples in a row knows"
    if shape.attention == "eager":
        return "writes its attention scores out (ALiBi, a softcap), over the whole row"
    if shape.head_dim > _WIDEST_HEAD:
        return f"has heads of {shape.head_dim}, and flash attention takes {_WIDEST_HEAD} at most"
    return ""
