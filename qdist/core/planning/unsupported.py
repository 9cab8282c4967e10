"""What cannot be trained of a model, whatever the machine: settings that its parts rule out."""

from collections.abc import Iterator, Mapping
from typing import Any

from qdist.core.errors import ModelError, SpecError
from qdist.core.model.shapes import ALL_LINEAR, EXPERTS, MOST_UNPACKED, UNPACKED_EXPERTS, ModelFacts
from qdist.core.model.storage import packing_of
from qdist.core.planning.packing import packs_samples
from qdist.core.spec.run_spec import RunSpec
from qdist.core.spec.sections import GPTQ_METHODS

_BALANCE_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef", "aux_loss_alpha")
"""Keys under which configurations weigh the balance loss of a router."""


def require_supported(spec: RunSpec, facts: ModelFacts, config: Mapping[str, Any]) -> None:
    """Raise SpecError for the first setting that a model's experts or routers rule out, ModelError for a target that it
    does not have. config: the content of the model's config.json.
    """
    facts.require_targets(spec.lora.targets)
    if error := next(_contradictions(spec, facts, config), None):
        raise error


def require_dense(facts: ModelFacts, *, what: str) -> None:
    """Raise ModelError if a model has experts, which GPTQ does not quantize. what: what was asked for, as a subject."""
    if any(shape.experts for shape in facts.shapes):
        raise ModelError(_for_dense_models(facts, what), try_="qdist quantize MODEL --method nf4, for experts too")


def _contradictions(spec: RunSpec, facts: ModelFacts, config: Mapping[str, Any]) -> Iterator[SpecError]:
    if spec.method in GPTQ_METHODS:
        yield from _with_experts(facts, f"method={spec.method}")
    adapted = tuple(name for name in spec.lora.targets if name.partition(".")[0] == EXPERTS)
    if adapted and spec.lora.dropout:
        rest = tuple(name for name in spec.lora.targets if name not in adapted)
        yield SpecError(
            f"lora.dropout={spec.lora.dropout:g} does not go with adapters on experts: PEFT applies theirs to the "
            "weights, where no input can be dropped",
            ways=[{"lora.dropout": 0.0}, {"lora.targets": rest or (ALL_LINEAR,)}],
        )
    if spec.pack and (reason := packs_samples(facts)):
        yield SpecError(f"pack=true: {facts.name} {reason}", ways=[{"pack": None}])
    yield from _balance_loss(spec, config)
    if spec.bits < 16:
        yield from _unpacked_experts(spec, facts)
    if spec.compute and spec.method == "qlora" and packing_of(spec, config).linear_bits == 16:
        yield SpecError(
            f"compute={spec.compute} is for packed linears, and those of {facts.name} are in 16 bits beside experts "
            "in MXFP4",
            ways=[{"compute": None}],
        )
    yield from _z_loss(spec, config)


def _for_dense_models(facts: ModelFacts, what: str) -> str:
    most = max(shape.experts.count for shape in facts.shapes if shape.experts)
    return f"{what} is for dense models: {facts.name} has {most} experts in a layer, which are packed to NF4 or int8"


def _with_experts(facts: ModelFacts, what: str) -> Iterator[SpecError]:
    if any(shape.experts for shape in facts.shapes):
        yield SpecError(
            _for_dense_models(facts, what),
            ways=[{"method": "qlora", "bits": 4, "quant.group_size": 128, "lora.pool": "peft",
                   "lora.pool_group_size": None}],
        )  # fmt: skip


def _unpacked_experts(spec: RunSpec, facts: ModelFacts) -> Iterator[SpecError]:
    """Experts that would stay in 16 bits where fewer were asked for."""
    left = [
        run.count * kept.parameters for run in facts.layers for kept in run.shape.kept
        if kept.reason == UNPACKED_EXPERTS
    ]  # fmt: skip
    share = sum(left) / max(1, sum(left) + facts.linear_weights)
    if share > MOST_UNPACKED:
        yield SpecError(
            f"the experts of {facts.name} are in a layout that qdist does not pack: {share:.0%} of the weights of its "
            f"decoder layers would stay in 16 bits where {spec.bits} were asked for",
            ways=[{"bits": 16}],
        )


def _z_loss(spec: RunSpec, config: Mapping[str, Any]) -> Iterator[SpecError]:
    if weight := config.get("z_loss_coefficient"):
        yield SpecError(
            f"z_loss_coefficient={weight} in the config.json of {spec.model} adds to the cross entropy, which qdist "
            "does not do",
            try_='"z_loss_coefficient": 0 in its config.json',
        )


def _balance_loss(spec: RunSpec, config: Mapping[str, Any]) -> Iterator[SpecError]:
    """The balance loss of routers, which transformers adds where a configuration asks for their logits."""
    inner = config.get("text_config")
    for own in (config, *([inner] if isinstance(inner, Mapping) else [])):
        weight = next((own[key] for key in _BALANCE_WEIGHTS if own.get(key) is not None), None)
        if own.get("output_router_logits") is True and weight != 0:
            times = f", times {weight:g}" if isinstance(weight, int | float) else ""
            yield SpecError(
                f"{spec.model} asks for the balance loss of its routers (output_router_logits is true{times}), which "
                "qdist does not add to the loss: routers are frozen",
                try_='"output_router_logits": false in its config.json',
            )
