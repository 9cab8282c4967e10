"""Attaches an adapter to a backbone through PEFT, for any method."""

import hashlib
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from qdist.core.model.adapters.targets import excluded_modules, target_modules
from qdist.core.planning.plan import Plan
from qdist.host.sources.models import public_name
from qdist.runtime.adapters.lora import adapted_product
from qdist.runtime.adapters.registry import METHODS, method_of
from qdist.runtime.model.packed import PackedLinear, frozen_product, is_offloaded

_BY_VARIANT = {type(method.variant()): method for method in METHODS.values()}


class FusedLora(LoraLinear):
    """PEFT's LoRA layer with `adapted_product` as its training pass; everything else is PEFT's."""

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        """PEFT's way to compute an adapter, or the method's own if it has one."""
        return method_of(vars(config)).variant() or super().resolve_lora_variant(config=config, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Create an adapter's matrices for the full base layer: PEFT 0.21 would measure this rank's shard of it."""
        base = self.get_base_layer()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.fan_in_fan_out = False  # true of a `Conv1D`, in whose place there is a linear here
        super().update_layer(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A or args or kwargs:
            return super().forward(x, *args, **kwargs)
        name = active[0]
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return super().forward(x)
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        scaling = _BY_VARIANT[type(self.lora_variant.get(name))].scaling(self, name)
        return adapted_product(x, down, up, self.get_base_layer(), scaling)


def settle_offloaded(model: nn.Module) -> None:
    """Move the adapters of offloaded layers to the GPU, and have their plain linears compute there.

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

    spec = plan.spec
    return LoraConfig(
        **METHODS[spec.method].peft_settings(plan),
        target_modules=target_modules(plan.facts, spec.lora.targets),
        exclude_modules=excluded_modules(plan.facts, spec.lora.targets),
        fan_in_fan_out=any(linear.transposed for linear in plan.facts.targeted(spec.lora.targets)),
        bias="none",
        task_type="CAUSAL_LM",
        trainable_token_indices=_token_rows(plan),
        base_model_name_or_path=public_name(spec.model, plan.source.path) if plan.source.path else None,
    )


def add_adapter(model: Any, plan: Plan) -> Any:
    """A PEFT model whose only trainable parameters are float32 LoRA matrices and rows of new tokens.

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
    """Initialize each layer's A from the seed and the layer's name.

    So a rank that holds some of the layers starts from the same numbers as one that holds them all.
    """
    method = METHODS[plan.spec.method]
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            digest = hashlib.sha256(f"{plan.spec.seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            bound = method.start_bound(plan, values.shape[1])
            values.uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(values)


def _token_rows(plan: Plan) -> dict[str, list[int]] | None:
    """Ids of the new rows to train, by leaf name of the table that holds them."""
    if not plan.source.new_token_ids:
        return None
    rows = list(plan.source.new_token_ids)
    tables = plan.facts.modules.tables
    return dict.fromkeys(tables[:1] if plan.facts.tied_embeddings else tables, rows)
