"""PEFT's LoRA layer over our frozen linears, computed as one product."""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn

from qdist.runtime.methods.adapted import adapted_product, frozen_product
from qdist.runtime.methods.packed import PackedLinear, is_offloaded


class FusedLora(LoraLinear):
    """PEFT's LoRA layer, whose training pass is `adapted_product`; whatever else PEFT can do is left to PEFT.

    So is QA-LoRA, which PEFT 0.21 itself offers on GPTQModel's layers alone.
    """

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        """PEFT's own way to compute QA-LoRA, where the adapter is one."""
        return QALoraLinearVariant() if config.use_qalora else super().resolve_lora_variant(config=config, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Make an adapter's matrices, for all of the base layer: PEFT 0.21 would measure this rank's shard of it."""
        base = self.get_base_layer()
        self.in_features, self.out_features = base.in_features, base.out_features
        super().update_layer(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A or args or kwargs:
            return super().forward(x, *args, **kwargs)
        name = active[0]
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return super().forward(x)
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        if name not in self.lora_variant:
            return adapted_product(x, down, up, self.get_base_layer(), self.scaling[name])
        # PEFT's convention: the mean of a group times the number of groups.
        scaling, pool = self.scaling[name] * down.shape[1], self.qalora_group_size[name]
        return adapted_product(x, down, up, self.get_base_layer(), scaling, pool)


def settle_offloaded(model: nn.Module) -> None:
    """Of layers whose weights wait in host memory, bring the adapter to the GPU, and have plain linears compute there.

    To be called once the adapter is on: PEFT 0.21 puts its matrices where the weights are.
    """
    for module in model.modules():
        if hasattr(module, "lora_A") and is_offloaded(module.base_layer):
            for matrices in (module.lora_A, module.lora_B):
                matrices.to(module.base_layer.runs_on)
        if is_offloaded(module) and not isinstance(module, PackedLinear):
            module.forward = partial(frozen_product, module)
