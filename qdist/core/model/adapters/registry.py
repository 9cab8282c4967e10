"""Which adapter methods are there?"""

from collections.abc import Mapping

from qdist.core.model.adapters.lora import LoraMethod
from qdist.core.model.adapters.qa_lora import QaLoraMethod
from qdist.core.model.shapes import ModelFacts

LORA = LoraMethod()
ADAPTERS: Mapping[str, type[LoraMethod]] = {"qlora": LoraMethod, "gptq-lora": LoraMethod, "qa-lora": QaLoraMethod}
"""The setting `method` -> what it trains. Called with the inputs that share a column of A."""


def adapter_parameters(facts: ModelFacts, rank: int, targets: tuple[str, ...], adapter: LoraMethod = LORA) -> int:
    """Trained parameters of a model. Raises ModelError when a target is not a linear of it."""
    facts.targeted(targets)
    return sum(
        run.count * adapter.parameters(linear, rank) for run in facts.layers for linear in run.shape.targeted(targets)
    )
