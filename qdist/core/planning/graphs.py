"""Can the passes of a layout's micro-batches be captured as CUDA graphs, and if not, why?"""

from typing import Literal

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
    offloaded: int = 0,
) -> str:
    """Why passes are launched one by one, as the rest of a sentence; empty if they are captured.

    offloaded: number of layers whose weights are in host memory.
    """
    if device == "cpu":
        return "there is no GPU"
    if spec.graphs is False:
        return "graphs=false"
    if layout.placement != "replicate":
        return f"placement {layout.placement} exchanges data within a pass"
    if layout.engine == "deepspeed":
        return "DeepSpeed adds gradients up in hooks of the backward pass"
    if offloaded:
        return "offloaded layers are copied within a pass"
    if spec.bits == 8:
        return "products in int8 wait for the GPU to report outliers"
    if any(shape.experts for shape in facts.shapes) and compute_dtype != "bfloat16":
        return f"experts in {compute_dtype} are taken in turn, as the router has it"
    return ""


def require_captured(spec: RunSpec, reason: str) -> None:
    """Raise SpecError if graphs were asked for and there is a reason against them."""
    if spec.graphs and reason:
        raise SpecError(f"graphs=true, but {reason}", ways=[{"graphs": None}])
