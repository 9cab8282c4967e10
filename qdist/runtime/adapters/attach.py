"""Attaches an adapter to a backbone through PEFT, for any method."""

import copy
import hashlib
import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from qdist.core.errors import SpecError
from qdist.core.model.adapters.targets import excluded_modules, target_modules
from qdist.core.planning.plan import Plan
from qdist.host.sources.models import public_name
from qdist.runtime.adapters.experts import adapt_experts
from qdist.runtime.adapters.lora import Reader, adapted_product, peft_name
from qdist.runtime.adapters.registry import METHODS, method_of
from qdist.runtime.adapters.sharing import SharedRead, share_reads
from qdist.runtime.kernels.dropout import Mask, constant_of
from qdist.runtime.model.dropout_seed import DropoutSeed, give_dropout_seed
from qdist.runtime.model.experts import is_experts
from qdist.runtime.model.packed import PackedLinear, frozen_product, is_offloaded
from qdist.runtime.model.packed_experts import PackedMatrices

_BY_VARIANT = {type(method.variant()): method for method in METHODS.values()}


class FusedLora(LoraLinear):
    """PEFT's LoRA layer with `adapted_product` as its training pass; everything else is PEFT's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed, self.constant = DropoutSeed(), 0
        """What its dropout mask is made from; `give_masks` sets them."""
        self.sharing: SharedRead | None = None
        """The linears that read what it reads; `share_reads` sets it."""

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        """PEFT's way to compute an adapter, or the method's own if it has one."""
        return method_of(vars(config)).variant() or super().resolve_lora_variant(config=config, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Create an adapter's matrices."""
        self.fan_in_fan_out = False  # true of a `Conv1D`, in whose place there is a linear here
        super().update_layer(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self.adapter_in_use()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        mask = self.mask(name, x.device)
        shared = self.sharing.product(self, x, name, mask) if self.sharing else None
        if shared is not None:
            return shared
        return adapted_product(x, *self.factors(name), *self.reader(name), mask)

    def adapter_in_use(self) -> str | None:
        """Name of the only adapter to compute with; None if PEFT computes."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            return None
        name: str = active[0]
        return name

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """An adapter's A and B."""
        return self.lora_A[name].weight, self.lora_B[name].weight

    def reader(self, name: str) -> Reader:
        """The frozen linear with the factor on B A."""
        scaling = _BY_VARIANT[type(self.lora_variant.get(name))].scaling(self, name)
        return Reader(self.get_base_layer(), scaling)

    def is_low_rank(self) -> bool:
        """Whether all its adapters add factor x B A, and nothing else."""
        return all(type(self.lora_variant.get(name)) in _BY_VARIANT for name in self.lora_A)

    def mask(self, name: str, device: torch.device) -> Mask | None:
        """The dropout of an adapter's input in this micro-batch; None in evaluation."""
        dropout = self.lora_dropout[name]
        if not self.training or isinstance(dropout, nn.Identity):
            return None
        return Mask(self.seed.on(device), self.constant, dropout.p)


def give_masks(model: nn.Module) -> None:
    """Have the adapted linears of a model share one dropout seed, each with a constant made from its path.

    So micro-batches of one width have the same masks in every placement, and those of two linears have nothing to do
    with each other.
    """
    seed = give_dropout_seed(model)
    for path, module in model.named_modules():
        if isinstance(module, FusedLora):
            module.seed, module.constant = seed, constant_of(path)


def settle_offloaded(model: nn.Module) -> None:
    """Move the adapters of offloaded layers to the GPU, and have their plain linears compute there.

    To be called once the adapter is on: PEFT 0.21 puts its matrices where the weights are.
    """
    for module in model.modules():
        if hasattr(module, "lora_A") and is_offloaded(module.base_layer):
            for matrices in (module.lora_A, module.lora_B):
                matrices.to(module.base_layer.runs_on)
        if is_offloaded(module) and isinstance(module, nn.Linear) and not isinstance(module, PackedLinear):
            module.forward = partial(frozen_product, module)


def lora_config(plan: Plan) -> Any:
    """PEFT's configuration of the plan's adapter."""
    from peft import LoraConfig

    spec = plan.spec
    linears = {linear.name for shape in plan.facts.shapes for linear in shape.targeted(spec.lora.targets)}
    as_parameters = {name for name in linears if name in _taken_for_experts(plan.facts.family)}
    if as_parameters and spec.lora.dropout:
        raise SpecError(
            f"PEFT reads adapters of {', '.join(sorted(as_parameters))} in {plan.facts.name} without dropout alone",
            ways=[{"lora.dropout": 0.0}],
        )
    parameters = [*plan.facts.targeted_parameters(spec.lora.targets), *(f"{name}.weight" for name in as_parameters)]
    return LoraConfig(
        **METHODS[spec.method].peft_settings(plan),
        target_modules=target_modules(plan.facts, spec.lora.targets, as_parameters),
        target_parameters=sorted(parameters) or None,
        exclude_modules=excluded_modules(plan.facts, spec.lora.targets),
        fan_in_fan_out=any(linear.transposed for linear in plan.facts.targeted(spec.lora.targets)),
        bias="none",
        task_type="CAUSAL_LM",
        trainable_token_indices=_token_rows(plan),
        base_model_name_or_path=public_name(spec.model, plan.source.path) if plan.source.path else None,
    )


def _taken_for_experts(family: str) -> Collection[str]:
    """Names of linears that PEFT 0.21 turns into parameters of experts where a configuration has them as modules.

    So adapters of transformers 4 are loaded, whose experts were linears; but a shared expert or a dense layer may have
    linears of these names, and its adapter would be lost. As the parameter `weight` of a linear they stay.
    """
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    return _MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(family), ())


def add_adapter(model: Any, plan: Plan) -> Any:
    """A PEFT model whose only trainable parameters are float32 LoRA matrices and rows of new tokens.

    The initial A depends on the seed alone: every rank, and every number of ranks, starts from the same one.
    """
    torch.manual_seed(plan.spec.seed)
    adapted = adapt(model, lora_config(plan))
    settle_offloaded(adapted)
    share_reads(adapted, plan.facts, FusedLora)
    _draw_by_name(adapted, plan)
    return adapted


def adapt(model: Any, config: Any) -> Any:
    """A PEFT model with the adapter that a configuration describes. Matrices beside experts are zero."""
    from peft import get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    config._register_custom_module({nn.Linear: FusedLora})
    names, experts, linears = config.target_parameters or (), set[str](), set[str]()
    for path, module in model.named_modules():
        experts |= {name for name in names if is_experts(module) and _is_in(path, name)}
        linears |= {f"{path}.weight" for name in names if isinstance(module, nn.Linear) and _is_in(path, name)}
    outside = copy.copy(config)
    # By whole paths: packed matrices of experts have parameters called `weight` too.
    outside.target_parameters = sorted(linears) or None
    outside.target_modules = config.target_modules or (set() if linears else DUMMY_TARGET_MODULES)
    outside.exclude_modules = _without_packed_experts(model, outside)
    with _made_beside(model):
        adapted = get_peft_model(model, outside)
    adapt_experts(adapted, config, tuple(sorted(experts)))
    give_masks(adapted)
    return adapted


def _made_beside(model: nn.Module) -> AbstractContextManager[Any]:
    """Make new matrices on a model's GPU: PEFT draws them twice before they are set, 2 s for a 7B's on a CPU."""
    device = next(model.parameters()).device
    return device if device.type == "cuda" else nullcontext()


def _without_packed_experts(model: nn.Module, config: Any) -> Any:
    """PEFT's `exclude_modules` with those packed matrices of experts that it would take for linears by their names."""
    from peft.tuners.tuners_utils import check_target_module_exists

    packed = [path for path, module in model.named_modules() if isinstance(module, PackedMatrices)]
    taken, excluded = [path for path in packed if check_target_module_exists(config, path)], config.exclude_modules
    if isinstance(excluded, str):
        return "|".join((f"(?:{excluded})", *map(re.escape, taken)))
    return [*(excluded or ()), *taken] or None


def _is_in(path: str, parameter: str) -> bool:
    """Whether a parameter that `target_parameters` names may be of the module at a path."""
    return f".{path}".endswith(f".{parameter.rpartition('.')[0]}")


def fill_adapter(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """Copy tensors by PEFT's stored names into an adapter, or into the part of it on this rank.

    Returns the names that only the model has, and those that only the tensors have.
    """
    lacking, given = [], set(tensors)
    for name, parameter in model.named_parameters():
        stored = peft_name(name)
        if stored in tensors:
            parameter.data.copy_(tensors[stored])
            given.discard(stored)
        elif ".lora_" in name:
            lacking.append(stored)
    return lacking, sorted(given)


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
