"""Puts a LoRA adapter on a backbone through PEFT, and takes it off again as plain tensors."""

import hashlib
import math
from typing import Any

import torch
from torch import nn

from qdist.core.plan import Plan
from qdist.core.pooling import alphas, factor_of
from qdist.host.sources import public_name
from qdist.runtime.methods.skeleton import decoder_layers

_TABLES = {"bloom": ("word_embeddings", "lm_head"), "gpt_neox": ("embed_in", "lm_head")}
"""Leaf names of the input and output embeddings where they are not embed_tokens and lm_head."""


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

    from qdist.runtime.methods.fused_lora import FusedLora, settle_offloaded

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
    tables = _TABLES.get(plan.facts.family, ("embed_tokens", "lm_head"))
    return dict.fromkeys(tables[:1] if plan.facts.tied_embeddings else tables, rows)


def prepare_for_training(model: Any, plan: Plan) -> None:
    """Gradient checkpointing (non-reentrant) and fused kernels, as planned."""
    if plan.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        from qdist.runtime.placements.stages import only_present

        # The loss is fused in qdist.runtime.loss, on learned tokens only.
        with only_present(model.get_base_model()):
            _apply_liger_kernel_to_instance(model.get_base_model(), fused_linear_cross_entropy=False)
    if plan.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in decoder_layers(model.get_base_model())[plan.checkpointed_layers :]:
            layer.gradient_checkpointing = False
    model.train()
