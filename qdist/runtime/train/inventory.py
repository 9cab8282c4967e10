"""What does a rank hold of a backbone, and which of it is adapted? Counted in the real modules, not in the plan."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from qdist.core.model.shapes import LayerShape, Linear, ModelFacts
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.inventory import (
    BIASES,
    EMBEDDINGS,
    HEAD,
    NORMS,
    OTHER,
    POSITIONS,
    STORED,
    UNPACKED,
    Inventory,
    Kind,
    Learned,
    Module,
    Part,
    take_inventory,
)
from qdist.core.telemetry.kernels import joined
from qdist.runtime.data.batches import Samples
from qdist.runtime.engine.torch import Comm
from qdist.runtime.model.packed import PackedModule
from qdist.runtime.model.sliced import Sliced
from qdist.runtime.train.kernels import kernels_of

_PEFT = "base_model.model."
_WRAPPERS = ("base_layer", "token_adapter")
"""Names that PEFT puts between a module and what it wraps."""


def inventory_of(model: Any, plan: Plan, samples: Samples, comm: Comm) -> Inventory:
    """The inventory of a run whose adapter is attached. Collective.

    Every group's is checked, and the first one's returned. Raises as `take_inventory` does, on every rank.
    """
    parts = comm.gather(count_part(model, plan))
    groups = [
        [part for part, rank in zip(parts, plan.ranks, strict=True) if rank.group == group]
        for group in range(plan.groups)
    ]
    data, kernels = learned_of(samples), joined([part.kernels for part in parts]).words
    found = [
        take_inventory(own, bits=plan.spec.bits, targets=plan.spec.lora.targets, data=data, kernels=kernels)
        for own in groups
    ]
    return found[0]


def learned_of(samples: Samples) -> Learned:
    """What the tokenized set says of its records."""
    summary = samples.tokenized.summary
    return Learned(
        samples=len(samples.tokenized),
        tokens=summary.tokens,
        learned_tokens=summary.learned_tokens,
        records=summary.records,
        none=summary.dropped,
        whole=summary.whole,
    )


def count_part(model: Any, plan: Plan) -> Part:
    """What this rank holds of a PEFT model's frozen backbone; what another rank has was removed or is sharded."""
    reader = _Reader(plan, adapted_paths(model))
    modules: list[Module] = []
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules(remove_duplicate=False):  # a block may stand at several depths
        own = dict(module.named_parameters(recurse=False))
        new = {key: value for key, value in own.items() if not value.requires_grad and value not in seen}
        seen.update(new.values())
        if own:
            found = list(reader.read(base_path(name), module, new))
            modules += found if new else ()
    experts = "" if not plan.facts.experts else "by grouped products" if plan.grouped else "one by one"
    if experts and plan.spec.compute:
        experts += f" in {plan.compute_dtype}"
    kernels = kernels_of(model.get_base_model(), fused=plan.liger, experts=experts, graphs=plan.graphs)
    return Part(tuple(modules), tuple(reader.missing()), kernels)


def base_path(name: str) -> str:
    """The path in transformers' class of a module of a PEFT model."""
    return ".".join(part for part in name.removeprefix(_PEFT).split(".") if part not in _WRAPPERS)


def adapted_paths(model: nn.Module) -> frozenset[str]:
    """Paths of linears with a trained adapter, and of expert modules' parameters."""
    found = set()
    for name, module in model.named_modules():
        sides = getattr(module, "lora_A", None)
        if sides is not None and any(parameter.requires_grad for parameter in sides.parameters()):
            parameter = getattr(module, "parameter_name", "")  # of PEFT's layer over a parameter
            of_experts = parameter and not is_linear(module.get_base_layer())
            found.add(base_path(name) + (f".{parameter}" if of_experts else ""))
    return frozenset(found)


class _Reader:
    """Tells what each module is by the plan's facts, and which of the facts' modules it has not met."""

    def __init__(self, plan: Plan, adapted: frozenset[str]) -> None:
        self._plan, self._adapted = plan, adapted
        self._facts: ModelFacts = plan.facts
        self._shapes = [plan.facts.shapes[run] for run in plan.facts.run_of_layer]
        self._met: dict[int, set[Linear]] = {}
        """Linears and experts' matrices met in each decoder layer that is here."""

    def read(self, path: str, module: nn.Module, own: Mapping[str, nn.Parameter]) -> Iterator[Module]:
        """A module's parameters: of a linear all together, biases aside, otherwise one by one.

        own: those that no module before had, such as a tied head's table.
        """
        found = self._layer(path)
        linear = self._planned(found, module) if found else None
        if found and linear:
            self._met[found[0]].add(linear)
            weights = {name: value for name, value in own.items() if not _is_bias(name)}
            yield self._matrix(path, module, linear, found[1], [*weights.values(), *_buffers(module)])
            own = {name: value for name, value in own.items() if _is_bias(name)}
        for name, parameter in own.items():
            yield self._parameter(path, name, module, parameter)

    def missing(self) -> Iterator[str]:
        """'q_proj of model.layers.3': what the facts have in layers that are here, and was not met."""
        for number, met in self._met.items():
            shape = self._shapes[number]
            stem = f"{self._facts.modules.layers}.{number}"
            for linear in shape.linears:
                if linear not in met:
                    yield f"{linear.name} of {stem}{linear.within and f'.{linear.within}'}"
            if shape.experts:
                lacking = (matrix for matrix in shape.experts.matrices if matrix not in met)
                yield from (f"{matrix.name} of {stem}.{shape.experts.path}" for matrix in lacking)

    def _layer(self, path: str) -> tuple[int, LayerShape, str] | None:
        """The decoder layer that a path is in, its shape, and the path in it."""
        found = self._facts.layer_at(path)
        if found is None:
            return None
        self._met.setdefault(found[0], set())
        return found[0], self._shapes[found[0]], found[1]

    @staticmethod
    def _planned(found: tuple[int, LayerShape, str], module: nn.Module) -> Linear | None:
        """The linear or matrix of the facts that a module is."""
        _, shape, inner = found
        if shape.kept_at(inner):
            return None
        return shape.linear_at(inner) if is_linear(module) else shape.matrix_at(inner)

    def _matrix(
        self, path: str, module: nn.Module, linear: Linear, shape: LayerShape, tensors: Iterable[torch.Tensor]
    ) -> Module:
        """A linear, or a parameter of experts, that the facts name."""
        held, targets = list(tensors), self._plan.spec.lora.targets
        kind: Kind = "expert" if linear in (shape.experts.matrices if shape.experts else ()) else "linear"
        named = shape.targeted(targets) if kind == "linear" else shape.targeted_matrices(targets)
        packed = isinstance(module, PackedModule) and module.bits < 16
        bits = module.bits if isinstance(module, PackedModule) else _bits_of(held)
        return Module(
            path, kind, bits, packing=module.kind if packed and isinstance(module, PackedModule) else "",
            reason="" if packed else self._why_whole(path, kind), own_bytes=_sharded(held), whole_bytes=_whole(held),
            is_targeted=linear in named, is_adapted=path in self._adapted,
        )  # fmt: skip

    def _parameter(self, path: str, name: str, module: nn.Module, parameter: nn.Parameter) -> Module:
        """A parameter that is no linear's matrix: one of unpacked experts, or one that is kept in 16 bits."""
        full = f"{path}.{name}"
        found = self._layer(path)
        matrix = found[1].matrix_at(found[2] + f".{name}") if found else None
        if found and matrix:
            self._met[found[0]].add(matrix)
            return self._matrix(full, module, matrix, found[1], [parameter])
        reason = self._reason(full, module, name, parameter)
        return Module(
            full, "other", _bits_of([parameter]), reason=reason, own_bytes=_sharded([parameter]),
            whole_bytes=_whole([parameter]), is_adapted=path in self._adapted and name == "weight",
        )  # fmt: skip

    def _reason(self, path: str, module: nn.Module, name: str, parameter: nn.Parameter) -> str:
        found, modules = self._layer(path), self._facts.modules
        left_out = [tower for tower in self._facts.left_out if path.startswith(f"{tower.path}.")]
        if left_out:
            return left_out[0].reason
        kept = found[1].kept_at(found[2]) if found else None
        if kept:
            return kept.reason
        owner = path.rpartition(".")[0]
        tables = {modules.embedding: EMBEDDINGS, modules.head: HEAD, **dict.fromkeys(modules.added, POSITIONS)}
        if owner in tables:
            return tables[owner]
        if "norm" in type(module).__name__.lower() or "norm" in owner.rpartition(".")[2].lower():
            return NORMS
        if _is_bias(name):
            return BIASES
        strange = is_linear(module) or (parameter.ndim == 3 and not isinstance(module, nn.Conv1d))
        return self._why_whole(owner, "linear") if found and strange else OTHER

    def _why_whole(self, path: str, kind: Kind) -> str:
        """Why a linear, or a parameter of experts, of a decoder layer is not packed."""
        plan = self._plan
        if plan.spec.bits >= 16:
            return ""
        beside_experts = kind == "linear" and plan.packing is not None and plan.packing.linear_bits == 16
        left_by_gptq = plan.source.gptq is not None and plan.source.gptq.of(path) is None
        return STORED if left_by_gptq or beside_experts else UNPACKED


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix: `nn.Linear`, or GPT-2's transposed `Conv1D`."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _is_bias(name: str) -> bool:
    return name.endswith("bias")


def _buffers(module: nn.Module) -> list[torch.Tensor]:
    return [buffer for _, buffer in module.named_buffers(recurse=False)]


def _bits_of(tensors: Iterable[torch.Tensor]) -> int:
    return next((8 * tensor.element_size() for tensor in tensors), 0)


def _sharded(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of this rank's part of those that are sharded."""
    return sum(tensor.kept.nbytes for tensor in tensors if isinstance(tensor, Sliced))


def _whole(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors if not isinstance(tensor, Sliced))
