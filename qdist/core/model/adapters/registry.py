"""Which adapter methods are there?"""

from collections.abc import Iterator, Mapping
from itertools import chain

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
    return sum(trained_matrices(shape, rank, targets, adapter))


def trained_matrices(
    shape: LayerShape, rank: int, targets: tuple[str, ...], adapter: LoraMethod = LORA
) -> tuple[int, ...]:
    """Trained parameters of each matrix of one decoder layer."""
    linears = (adapter.matrices(linear, rank) for linear in shape.targeted(targets))
    return (*chain.from_iterable(linears), *_matrices_beside_experts(shape, rank, targets))


def beside_experts(shape: LayerShape, rank: int, targets: tuple[str, ...]) -> int:
    """Those beside a layer's experts."""
    return sum(_matrices_beside_experts(shape, rank, targets))


def _matrices_beside_experts(shape: LayerShape, rank: int, targets: tuple[str, ...]) -> Iterator[int]:
    """Parameters of each matrix in PEFT's layout: A [experts x r, in], B [out, r x experts]."""
    if shape.experts is not None:
        for matrix in shape.targeted_matrices(targets):
            yield from (shape.experts.count * rank * width for width in (matrix.inputs, matrix.outputs))
