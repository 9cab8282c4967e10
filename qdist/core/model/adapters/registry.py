"""Which adapter methods are there?"""

from collections.abc import Mapping

from qdist.core.model.adapters.lora import LoraMethod
from qdist.core.model.adapters.qa_lora import QaLoraMethod
from qdist.core.model.shapes import LayerShape, ModelFacts

LORA = LoraMethod()
ADAPTERS: Mapping[str, type[LoraMethod]] = {"qlora": LoraMethod, "gptq-lora": LoraMethod, "qa-lora": QaLoraMethod}
"""The setting `method` -> what it trains. Called with the inputs that share a column of A."""


def adapter_parameters(facts: ModelFacts, rank: int, targets: tuple[str, ...], adapter: LoraMethod = LORA) -> int:
    """Trained parameters of a model, experts' included. Raises ModelError when it does not have a target."""
    facts.require_targets(targets)
    return sum(run.count * trained_parameters(run.shape, rank, targets, adapter) for run in facts.layers)


def expert_adapter_parameters(facts: ModelFacts, rank: int, targets: tuple[str, ...]) -> int:
    """Those of them that are beside routed experts."""
    return sum(run.count * beside_experts(run.shape, rank, targets) for run in facts.layers)


def trained_parameters(shape: LayerShape, rank: int, targets: tuple[str, ...], adapter: LoraMethod) -> int:
    """Trained parameters of one decoder layer."""
    linears = sum(adapter.parameters(linear, rank) for linear in shape.targeted(targets))
    return linears + beside_experts(shape, rank, targets)


def beside_experts(shape: LayerShape, rank: int, targets: tuple[str, ...]) -> int:
    """Those beside a layer's experts, in PEFT's layout: A [experts x r, in], B [out, r x experts], for each."""
    if shape.experts is None:
        return 0
    matrices = shape.targeted_matrices(targets)
    return shape.experts.count * rank * sum(matrix.inputs + matrix.outputs for matrix in matrices)
