"""QA-LoRA in PEFT's terms (Xu et al. 2023): LoRA on the means of consecutive inputs."""

import math
from typing import Annotated, Any

import torch
from msgspec import Meta

from qdist.core.model.adapters.qa_lora import alphas, factor_of
from qdist.core.planning.plan import Plan
from qdist.runtime.adapters.lora import Lora, LoraSettings

UNPOOLED = {"use_qalora": False, "qalora_group_size": 16}
"""PEFT's settings of an adapter without pooling."""


class QaLoraSettings(LoraSettings):
    """The fields used from PEFT's adapter_config.json."""

    use_qalora: bool = False
    qalora_group_size: Annotated[int, Meta(gt=0)] = 16

    @property
    def pool(self) -> int:
        return self.qalora_group_size

    def factor(self, path: str, down: torch.Tensor) -> float:
        # PEFT takes the mean of a group times the number of groups.
        return super().factor(path, down) * (down.shape[1] / self.pool)


class QaLora(Lora):
    """LoRA on pooled means, which PEFT 0.21 itself offers only on GPTQModel's layers."""

    settings_type = QaLoraSettings

    def peft_settings(self, plan: Plan) -> dict[str, Any]:
        """The method's settings in PEFT's configuration; conventions other than PEFT's become a factor on alpha."""
        spec = plan.spec
        factors = {}
        if spec.lora.pool != "peft":
            factors = {"alpha_pattern": alphas(spec, plan.facts.targeted(spec.lora.targets), plan.pool)}
        return {**super().peft_settings(plan), "use_qalora": True, "qalora_group_size": plan.pool, **factors}

    def variant(self) -> Any:
        from peft.tuners.lora.variants import QALoraLinearVariant

        return QALoraLinearVariant()

    def start_bound(self, plan: Plan, columns: int) -> float:
        """Bound that gives a group's column the variance of the sum of its inputs' LoRA columns, in any convention."""
        inputs = columns * plan.pool
        return math.sqrt(plan.pool / inputs) / factor_of(plan.spec.lora.pool, inputs, plan.pool)

    def metadata(self, plan: Plan) -> dict[str, str]:
        return {"pool": plan.spec.lora.pool, "pool_group_size": str(plan.pool)}

    def scaling(self, layer: Any, name: str) -> float:
        """The scaling in PEFT's convention: the mean of a group times the number of groups."""
        groups: int = layer.lora_A[name].weight.shape[1]
        return super().scaling(layer, name) * groups
