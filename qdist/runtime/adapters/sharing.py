"""Which adapted linears read one tensor, and how do they share one pass over it?"""

from collections import defaultdict
from typing import Any, Protocol

import torch
from torch import nn

from qdist.core.model.shapes import ModelFacts, Reads
from qdist.runtime.adapters.lora import Reader, adapted_products
from qdist.runtime.kernels.dropout import Mask, constant_of
from qdist.runtime.model.packed import is_offloaded


class Shareable(Protocol):
    """An adapted linear that may compute with others."""

    constant: int
    sharing: "SharedRead | None"

    def adapter_in_use(self) -> str | None:
        """Name of the only adapter to compute with; None if PEFT computes."""

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """An adapter's A and B."""

    def reader(self, name: str) -> Reader:
        """The frozen linear with the factor on B A."""


class SharedRead:
    """Linears of one module that read one tensor. The first to be called computes for all; the others take theirs.

    What waits is held for the tensor that was given, and dropped when a linear is called with another one.
    """

    def __init__(self, members: tuple[Shareable, ...]) -> None:
        self.members = members
        self._given: torch.Tensor | None = None
        self._waiting = dict[int, torch.Tensor]()

    def product(self, member: Shareable, inputs: torch.Tensor, name: str, mask: Mask | None) -> torch.Tensor | None:
        """A member's product; None if the members are not all to be computed with this adapter."""
        if inputs is not self._given or id(member) not in self._waiting:
            if any(each.adapter_in_use() != name for each in self.members):
                return None
            self._given, self._waiting = inputs, self._products(inputs, name, mask)
        product = self._waiting.pop(id(member))
        if not self._waiting:
            self._given = None
        return product

    def _products(self, inputs: torch.Tensor, name: str, mask: Mask | None) -> dict[int, torch.Tensor]:
        downs, ups = zip(*(each.factors(name) for each in self.members), strict=True)
        readers = tuple(each.reader(name) for each in self.members)
        products = adapted_products(inputs, downs, ups, readers, mask)
        return dict(zip(map(id, self.members), products, strict=True))


def share_reads(model: nn.Module, facts: ModelFacts, kind: type[nn.Module]) -> None:
    """Join the adapted linears, modules of `kind`, that read one tensor of a decoder layer. Offloaded ones stay alone.

    They draw one dropout mask between them, also where one of them is computed alone.
    """
    for what, members in readers_of_one_tensor(model, facts, kind).items():
        if len(members) > 1:
            _join(tuple(members.values()), constant_of(what))


def readers_of_one_tensor(
    model: nn.Module, facts: ModelFacts, kind: type[nn.Module] | tuple[type[nn.Module], ...]
) -> dict[str, dict[str, nn.Module]]:
    """The linears of `kind`, by their paths, that read each tensor of a decoder layer; none that are offloaded."""
    reads = {linear.name: linear.reads for shape in facts.shapes for linear in shape.linears}
    groups = defaultdict[tuple[str, Reads, Any], dict[str, nn.Module]](dict)
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        if isinstance(module, kind) and leaf in reads and not is_offloaded(getattr(module, "base_layer", module)):
            groups[parent, reads[leaf], module.in_features][path] = module
    return {f"{parent} {what}": members for (parent, what, _), members in groups.items()}


def _join(members: tuple[Shareable, ...], constant: int) -> None:
    sharing = SharedRead(members)
    for member in members:
        member.sharing, member.constant = sharing, constant
