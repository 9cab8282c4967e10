"""Can the passes of a layout's micro-batches be captured as CUDA graphs, and if not, why?"""

from collections.abc import Mapping
from typing import Any, Literal

from qdist.core.errors import SpecError
from qdist.core.model.shapes import ModelFacts
from qdist.core.planning.placements.base import Layout
from qdist.core.spec.run_spec import RunSpec


def why_eager(
    spec: RunSpec,
    facts: ModelFacts,
    layout: Layout,
    *,
    device: Literal["cuda", "cpu"],
    compute_dtype: str,
    config: Mapping[str, Any],
    recomputed: int = 0,
    offloaded: int = 0,
) -> str:
    """Why passes are launched one by one, as the rest of a sentence; empty if they are captured.

    config: the content of the model's config.json. recomputed, offloaded: number of layers that are recomputed, and
    whose weights are in host memory.
    """
    if device == "cpu":
        return "there is no GPU"
    if spec.graphs is False:
        return "graphs=false"
    if offloaded:
        return "offloaded layers are copied within a pass"
    if layout.placement == "split":
        return "stages of a split wait for each other within a pass"
    if layout.engine == "deepspeed":
        return "DeepSpeed adds gradients up in hooks of the backward pass"
    if spec.bits == 8:
        return "products in int8 wait for the GPU to report outliers"
    if any(shape.experts for shape in facts.shapes) and compute_dtype != "bfloat16":
        return f"experts in {compute_dtype} are taken in turn, as the router has it"
    if recomputed and (key := own_dropout(config)):
        return f"recomputed layers draw the model's own dropout ({key}) again, from a state that a graph cannot read"
    return ""


def require_captured(spec: RunSpec, reason: str) -> None:
    """Raise SpecError if graphs were asked for and there is a reason against them."""
    if spec.graphs and reason:
        raise SpecError(f"graphs=true, but {reason}", ways=[{"graphs": None}])


def own_dropout(config: Mapping[str, Any]) -> str:
    """The first key of a configuration that drops something out; empty if there is none."""
    inner = config.get("text_config")
    for own in (config, inner if isinstance(inner, Mapping) else {}):
        for key, value in own.items():
            if "drop" in key and isinstance(value, float) and value > 0:
                return str(key)
    return ""
