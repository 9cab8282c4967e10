"""What a plan says of a model's parts: experts, what is adapted, what stays in 16 bits or is left out, kernels."""

from collections.abc import Iterator

from qdist.core.model.gptq import Gptq
from qdist.core.model.shapes import Kept, LayerShape, ModelFacts
from qdist.core.planning.plan import Plan
from qdist.core.spec.run_spec import RunSpec
from qdist.core.text import counted, format_count

_NAMED = 4
"""Reasons named in the line of what is kept."""
_WORTH_COUNTING = 0.01
"""Share of what is kept from which a reason's parameters are counted there."""


def experts_lines(facts: ModelFacts) -> Iterator[str]:
    """'experts  48 layers of 128, 8 active: 29.0 B of 30.5 B parameters', and that memory does not vary."""
    kinds: dict[tuple[int, int], int] = {}
    for run in facts.layers:
        if experts := run.shape.experts:
            kind = experts.count, experts.active
            kinds[kind] = kinds.get(kind, 0) + run.count
    if not kinds:
        return
    layers = ", ".join(
        f"{counted(number, 'layer')} of {count}, {active} active" for (count, active), number in kinds.items()
    )
    own, whole = format_count(facts.expert_parameters), format_count(facts.parameters)
    yield f"experts  {layers}: {own} of {whole} parameters; memory is the same however tokens are routed"


def weights_in_words(spec: RunSpec, gptq: Gptq | None, *, mxfp4: bool) -> str:
    """How the backbone is packed: '4 bits nf4, double quantization'."""
    if gptq or spec.bits != 4:
        return str(gptq or f"{spec.bits} bits")
    if mxfp4:
        return "experts in MXFP4 as they come, linears in 16 bits"
    return f"4 bits {spec.quant.type}" + ", double quantization" * spec.quant.double


def adapter_in_words(plan: Plan) -> str:
    """'40.0 M parameters', and of experts '13.4 M parameters on linears, 1.7 B on experts'."""
    beside = plan.expert_adapter_parameters
    rest = format_count(plan.adapter_parameters - beside)
    if beside:
        return f"{rest} parameters on linears, {format_count(beside)} on experts"
    return f"{rest} parameters" + (" on linears, none on experts" if plan.facts.expert_parameters else "")


def kept_lines(plan: Plan) -> Iterator[str]:
    """What is kept in 16 bits and why, what is not loaded, and the kernels assumed."""
    facts = plan.facts
    reasons: dict[str, int] = {}
    for run in facts.layers:
        for kept in run.shape.kept:
            reasons[kept.reason] = reasons.get(kept.reason, 0) + run.count * kept.parameters
    if reasons:
        largest = sorted(reasons, key=lambda reason: -reasons[reason])
        whole = sum(reasons.values())
        told = [
            f"{reason} ({format_count(reasons[reason])})" if reasons[reason] >= _WORTH_COUNTING * whole else reason
            for reason in largest[:_NAMED]
        ]
        more = [f"{counted(len(largest) - _NAMED, 'more reason')}"] if len(largest) > _NAMED else []
        why = ", ".join((*told, *more)) if len(largest) > 1 else largest[0]
        yield f"kept     {format_count(whole)} parameters not packed: {why}"
    if facts.left_out:
        yield f"left out {', '.join(map(_tower, facts.left_out))}: not needed for text"
    if special := [*_kernels(facts.shapes, plan)]:
        yield f"kernels  {', '.join(special)}"


def _tower(tower: Kept) -> str:
    return tower.path + (f" ({format_count(tower.parameters)})" if tower.parameters else "")


def _kernels(shapes: tuple[LayerShape, ...], plan: Plan) -> Iterator[str]:
    if any(shape.attention == "eager" and shape.kv_heads < shape.heads for shape in shapes):
        yield "attention that writes out its scores (eager)"
    if plan.recurrence:
        yield "recurrence by " + ("flash-linear-attention" if plan.recurrence == "fla" else "torch's operations")
    if any(shape.experts for shape in shapes):
        yield "experts " + ("by grouped products" if plan.grouped else "one by one")
