"""A backbone sharded over the ranks of a group: packed bytes gathered layer by layer, just in time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from qdist.core.planning.plan import Plan
from qdist.runtime.model.parts import decoder_layers, decoder_of, embedding_of, parts_of
from qdist.runtime.model.sliced import Peers, Unit
from qdist.runtime.placements.base import LoneRank
from qdist.runtime.placements.gathers import Gathers, slice_units


class Shard(LoneRank):
    """A rank that holds 1/k of every layer's packed bytes. The group gathers them together, layer by layer.

    Only the frozen backbone is divided. Adapters are put on later and are whole on every rank.
    """

    in_step = True

    def __init__(self, plan: Plan, rank: int, devices: tuple[torch.device, ...]) -> None:
        super().__init__(plan, rank, devices)
        self._units: Sequence[Unit] = ()
        self.gathers: Gathers | None = None
        """Once the backbone is settled."""

    @property
    def can_answer(self) -> bool:
        return True

    def arrange(self, model: Any) -> None:
        self._peers = Peers(_group_of(self.plan))
        self._units = tuple(slice_units(model, _paths_of(model, self.plan), peers=self._peers, device=self.devices[0]))

    def settle(self, backbone: Any) -> None:
        layers = decoder_layers(backbone)
        units, tables = self._units[: len(layers)], self._units[len(layers) :]
        self.gathers = Gathers(units, tables, peers=self._peers, device=self.devices[0])
        self.gathers.watch(decoder_of(backbone), list(layers), embedding_of(backbone))

    def verify(self, backbone: Any) -> int:
        assert self.gathers is not None  # `settle` came before
        return self.gathers.check()


def _paths_of(model: Any, plan: Plan) -> tuple[str, ...]:
    """What is gathered at a time: each decoder layer, then embedding and head."""
    parts = parts_of(model)
    layers = (f"{parts.layers}.{index}" for index in range(len(decoder_layers(model))))
    return (*layers, *((parts.embedding, parts.head) if shards_embeddings(plan) else ()))


def shards_embeddings(plan: Plan) -> bool:
    """Whether embeddings are sharded: tied tables and those with added rows stay whole on every rank."""
    return not plan.facts.tied_embeddings and plan.source.vocab_rows is None


def _group_of(plan: Plan) -> Any:
    """The ranks that together hold one backbone. Collective."""
    if plan.groups == 1:  # the ranks of the run, whose communicator there is already
        return init_device_mesh(plan.device, (plan.gpus_per_group,), mesh_dim_names=("shard",)).get_group()
    mesh = init_device_mesh(plan.device, (plan.groups, plan.gpus_per_group), mesh_dim_names=("group", "shard"))
    return mesh["shard"].get_group()
