"""Puts a LoRA adapter on a backbone through PEFT, computes it as one product, and takes it off as plain tensors."""

import hashlib
import math
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn

from qdist.core.model.families import FAMILIES
from qdist.core.model.pooling import alphas, factor_of
from qdist.core.planning.plan import Plan
from qdist.host.sources.models import public_name
from qdist.runtime.model.adapted import adapted_product, frozen_product
from qdist.runtime.model.packed import PackedLinear, is_offloaded
from qdist.runtime.model.skeleton import decoder_layers


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


def lora_config(plan: Plan) -> Any:
    """PEFT's configuration of the plan's adapter."""
    from peft import LoraConfig

    spec, targeted = plan.spec, plan.facts.targeted(plan.spec.lora.targets)
    pooling: dict[str, Any] = {}
    if plan.pool > 1:
        pooling = {"use_qalora": True, "qalora_group_size": plan.pool}
        if spec.lora.pool != "peft":
            pooling["alpha_pattern"] = alphas(spec, targeted, plan.pool)
    return LoraConfig(
        r=spec.lora.r,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules=sorted(linear.name for linear in targeted),
        bias="none",
        task_type="CAUSAL_LM",
        trainable_token_indices=_token_rows(plan),
        base_model_name_or_path=public_name(spec.model, plan.source.path) if plan.source.path else None,
        **pooling,
    )


def add_adapter(model: Any, plan: Plan) -> Any:
    """A PEFT model whose float32 LoRA matrices, and rows of new tokens, are all that trains.

    The initial A depends on the seed alone: every rank, and every number of ranks, starts from the same one.
    """
    from peft import get_peft_model

    torch.manual_seed(plan.spec.seed)
    config = lora_config(plan)
    config._register_custom_module({nn.Linear: FusedLora})
    adapted = get_peft_model(model, config)
    settle_offloaded(adapted)
    _draw_by_name(adapted, plan)
    return adapted


def _draw_by_name(model: nn.Module, plan: Plan) -> None:
    """PEFT's initial A (He et al. 2015, as nn.Linear), drawn for each layer from the seed and its name.

    So a rank that holds some of the layers starts from the same numbers as one that holds them all. QA-LoRA's column of
    a group has the variance of the sum of its inputs' columns in LoRA, in every convention.
    """
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            digest = hashlib.sha256(f"{plan.spec.seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            inputs = values.shape[1] * plan.pool
            factor = 1.0 if plan.pool == 1 else factor_of(plan.spec.lora.pool, inputs, plan.pool)
            bound = math.sqrt(plan.pool / inputs) / factor
            values.uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(values)


def _token_rows(plan: Plan) -> dict[str, list[int]] | None:
    """New rows to train, by the leaf name of the table that holds them."""
    if not plan.source.new_token_ids:
        return None
    rows = list(plan.source.new_token_ids)
    tables = FAMILIES[plan.facts.family].modules.tables
    return dict.fromkeys(tables[:1] if plan.facts.tied_embeddings else tables, rows)


def prepare_for_training(model: Any, plan: Plan) -> None:
    """Gradient checkpointing (non-reentrant) and fused kernels, as planned."""
    if plan.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        from qdist.runtime.placements.split.stages import only_present

        # The loss is fused in qdist.runtime.engine.objective, on learned tokens only.
        with only_present(model.get_base_model()):
            _apply_liger_kernel_to_instance(model.get_base_model(), fused_linear_cross_entropy=False)
    if plan.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in decoder_layers(model.get_base_model())[plan.checkpointed_layers :]:
            layer.gradient_checkpointing = False
    model.train()
