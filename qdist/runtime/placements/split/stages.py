"""Stages of a split backbone: which rank holds which, removing the others' parts, and one process over several GPUs."""

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from qdist.core.errors import PlanError, RunError
from qdist.core.planning.plan import Plan
from qdist.runtime.model.parts import (
    decoder_layers,
    decoder_of,
    embedding_of,
    head_of,
    items_returned,
    parts_of,
)


class Absent(nn.Module):
    """Stand-in for a part that another rank holds: no parameters, passes its input through."""

    def __init__(self, *, items: int = 0) -> None:
        """items: length of the tuple to return, of which hidden states are the first; 0 for hidden states alone."""
        nn.Module.__init__(self)  # not that of the layer's class, which a stand-in for a layer has too
        self.items = items

    def __call__(self, *given: Any, **named: Any) -> Any:
        return nn.Module.__call__(self, *given, **named)  # a layer's own would checkpoint what computes nothing

    def forward(self, *given: Any, **named: Any) -> Any:
        hidden = self.passed(given[0] if given else next(iter(named.values())))
        return (hidden, *[None] * (self.items - 1)) if self.items else hidden

    def passed(self, hidden: Any) -> Any:
        """What goes on to the next part."""
        return hidden


class Entrance(Absent):
    """Stand-in for the layer before a stage's first: gives it exactly what was received from the stage before.

    Whatever the class does to embeddings on the way to its layers (scales, norms, positions) was done by stage 0.
    """

    received: Any = None

    def passed(self, hidden: Any) -> Any:
        return self.received


class Exit(Absent):
    """Stand-in for the layer behind a stage's last: takes what this would read, before any final norm."""

    taken: Any = None

    def passed(self, hidden: Any) -> Any:
        self.taken = hidden
        return hidden


class _StageForward:
    """The forward pass of a decoder with some of its layers, from and to hidden states between layers."""

    def __init__(self, forward: Any, entrance: Entrance | None, exit_: Exit | None) -> None:
        self._forward, self._entrance, self._exit = forward, entrance, exit_

    def __call__(self, *given: Any, inputs_embeds: Any = None, **named: Any) -> Any:
        if self._entrance is not None:
            # What the class makes of these (CTRL in place) is not used, only their shape, device and dtype.
            self._entrance.received, inputs_embeds = inputs_embeds, torch.zeros_like(inputs_embeds)
        outputs = self._forward(*given, inputs_embeds=inputs_embeds, **named)
        if self._entrance is not None:
            self._entrance.received = None
        if self._exit is None:
            return outputs
        taken, self._exit.taken = self._exit.taken, None
        return (taken,)


class _NothingToAdd(nn.Module):
    """Stand-in for a table whose output the first stage has already added, such as OPT's position embedding."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.width = table.embedding_dim

    def forward(self, given: torch.Tensor, *_: Any, position_ids: Any = None, **__: Any) -> torch.Tensor:
        places = (
            given if position_ids is None else position_ids
        )  # OPT gives its mask first, and positions if it has any
        return torch.zeros((*places.shape, self.width), device=places.device)


def keep_stage(model: Any, layers: range, *, first: bool, last: bool) -> None:
    """Remove from a causal language model what this stage does not own, in place, with or without weights in it.

    Kept modules keep their names (model.layers.37...), and so do adapters and checkpoints. The first stage embeds,
    the last one has the final norm and the head; a head that is tied to the embedding keeps that table.
    Other stages are given hidden states as `inputs_embeds` of the decoder.
    """
    modules, decoder = parts_of(model), decoder_of(model)
    tied = head_of(model).weight is embedding_of(model).weight
    entrance, exit_ = _empty_others(decoder_layers(model), layers)
    decoder.forward = _StageForward(decoder.forward, entrance, exit_)
    if not last:
        _remove(model, modules.final_norm, modules.head)
    if not first:
        _remove(model, *modules.before)
        for path in modules.added:
            model.set_submodule(path, _NothingToAdd(model.get_submodule(path)))
        if not (last and tied):
            _remove(model, modules.embedding)
    if tied and not last:
        # There is one of the two here, and nothing to tie it to.
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
        model._tied_weights_keys, model.all_tied_weights_keys = {}, {}


def _empty_others(stack: nn.ModuleList, layers: range) -> tuple[Entrance | None, Exit | None]:
    """Put stand-ins in the place of layers that are not this stage's; those next to its own, if it has such."""
    kinds: dict[int, type[Absent]] = {layers[0] - 1: Entrance, layers[-1] + 1: Exit}
    for index in range(len(stack)):
        if index not in layers:
            stack[index] = _stand_in(kinds.get(index, Absent), stack[index])
    before = stack[layers[0] - 1] if layers[0] > 0 else None
    behind = stack[layers[-1] + 1] if layers[-1] + 1 < len(stack) else None
    return before, behind


def _stand_in(kind: type[Absent], layer: nn.Module) -> Absent:
    """A stand-in for a layer that is of its class and has its plain attributes, which decoders look at."""
    made: Absent = type(kind.__name__, (kind, type(layer)), {})(items=items_returned(type(layer)))
    for name, value in vars(layer).items():
        if not name.startswith("_") and name not in ("forward", "training"):
            setattr(made, name, value)
    return made


def arrange_stage(plan: Plan, rank: int) -> Any:
    """The `arrange` argument of `load_backbone` for a rank of a split plan whose ranks are stages.

    Raises PlanError for a plan with new vocabulary rows, as first and last stage would each train some of them, and
    for a model or a layer map that cannot be computed in stages.
    """
    if plan.source.new_token_ids:
        raise PlanError(
            f"split cannot train {len(plan.source.new_token_ids)} new row(s) of the vocabulary",
            try_="--placement shard, or a tokenizer that needs no new tokens",
        )
    if plan.facts.unsplit:
        raise PlanError(f"the model {plan.facts.unsplit}: its layers cannot lie in stages", try_="--placement shard")
    together = set(plan.layer_map[plan.facts.together_from :]) if plan.facts.together_from is not None else set()
    if len(together) > 1:
        raise PlanError(
            f"layers from {plan.facts.together_from} on share keys and values, and lie in {len(together)} stages",
            try_="--placement shard, or fewer stages",
        )
    position = plan.ranks[rank].position
    layers = layers_of(plan, position)

    def arrange(model: Any) -> None:
        keep_stage(model, layers, first=position == 0, last=position == plan.gpus_per_group - 1)

    return arrange


def layers_of(plan: Plan, position: int) -> range:
    """The decoder layers of a position. Raises PlanError if the layer map gives it none, or gives it a gap."""
    layers = [layer for layer, owner in enumerate(plan.layer_map) if owner == position]
    if not layers or layers != list(range(layers[0], layers[-1] + 1)):
        raise PlanError(
            f"position {position} of {plan.gpus_per_group} has layers {layers}", try_="one run of layers for each GPU"
        )
    return range(layers[0], layers[-1] + 1)


@contextlib.contextmanager
def only_present(model: Any) -> Iterator[None]:
    """Hide absent parts from code that patches every layer and the final norm of a model (Liger).

    Absent layers leave the list meanwhile, and an absent final norm that was patched is made anew.
    """
    norm, stack = parts_of(model).final_norm, decoder_layers(model)
    everything = dict(stack.named_children())
    for key, layer in everything.items():
        if isinstance(layer, Absent):
            delattr(stack, key)
    without_norm = bool(norm) and isinstance(model.get_submodule(norm), Absent)
    try:
        yield
    finally:
        kept = dict(stack.named_children())
        for key in kept:
            delattr(stack, key)
        for key, layer in everything.items():
            stack.add_module(key, kept.get(key, layer))
        if without_norm:
            _remove(model, norm)


def _remove(model: nn.Module, *paths: str) -> None:
    """Replace the module at each path, unless empty, with a stand-in."""
    for path in filter(None, paths):
        model.set_submodule(path, Absent())


class Grid(NamedTuple):
    """This rank's position. Ranks are numbered group by group, and stage by stage within one."""

    group: int
    position: int
    groups: int
    stages: int
    mates: Any
    """Process group of this group's stages."""
    peers: Any
    """Process group of the ranks with this stage, one in each group."""

    @property
    def first(self) -> bool:
        """Whether this stage embeds tokens."""
        return self.position == 0

    @property
    def last(self) -> bool:
        """Whether this stage computes the loss."""
        return self.position == self.stages - 1

    def rank_at(self, position: int) -> int:
        """The rank with another stage of this group."""
        return self.group * self.stages + position

    def over_stages(self, value: torch.Tensor) -> torch.Tensor:
        """A scalar summed over the stages of this group."""
        total = value.clone()
        dist.all_reduce(total, group=self.mates)
        return total

    # What DeepSpeed asks of an `mpu`. Stages are its model parallelism: it sums norms and overflows over them.

    def get_model_parallel_rank(self) -> int:
        return self.position

    def get_model_parallel_world_size(self) -> int:
        return self.stages

    def get_model_parallel_group(self) -> Any:
        return self.mates

    def get_data_parallel_rank(self) -> int:
        return self.group

    def get_data_parallel_world_size(self) -> int:
        return self.groups

    def get_data_parallel_group(self) -> Any:
        return self.peers

    def get_data_parallel_group_ranks(self) -> list[int]:
        return [group * self.stages + self.position for group in range(self.groups)]


def make_grid(plan: Plan, *, timeout: datetime.timedelta) -> Grid:
    """Create the process groups of a split plan. Collective over all ranks of the run.

    Raises RunError when the ranks are not those of the plan.
    """
    groups, stages = plan.groups, plan.gpus_per_group
    if not dist.is_initialized() or dist.get_world_size() != groups * stages:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        raise RunError(f"{groups} group(s) of {stages} stages, and {ranks} rank(s)", try_="--resume")
    rank = dist.get_rank()
    mates = peers = None
    if groups == 1:  # all ranks of the run, whose communicator there is already: a second one takes 0.5 GiB
        mates = dist.group.WORLD
    # Every rank makes every process group, in the same order.
    for group in range(groups if groups > 1 else 0):
        made = dist.new_group([group * stages + position for position in range(stages)], timeout=timeout)
        mates = made if group == rank // stages else mates
    for position in range(stages):
        made = dist.new_group([group * stages + position for group in range(groups)], timeout=timeout)
        peers = made if position == rank % stages else peers
    grid = Grid(rank // stages, rank % stages, groups, stages, mates, peers)
    # NCCL wants all ranks in a group's first exchange, and the first one of a pipeline is between two.
    dist.barrier(group=mates)
    return grid


def spread(model: Any, layer_devices: Sequence[torch.device]) -> None:
    """Assign a device to each part of a causal language model, and have every part fetch its inputs.

    The parts get their weights there afterwards (`fill`), and adapters follow them.
    layer_devices: of each decoder layer. What comes before the layers goes to the first device, final norm and head
    to the last; a head that is tied to the embedding stays with it.
    """
    decoder, layers = decoder_of(model), decoder_layers(model)
    first, last = layer_devices[0], layer_devices[-1]
    norm = model.get_submodule(parts_of(model).final_norm) if parts_of(model).final_norm else None
    for child in decoder.children():
        if child is not layers:
            _put_on(child, last if child is norm else first)
    for layer, device in zip(layers, layer_devices, strict=True):
        _put_on(layer, device)
    head = head_of(model)
    _put_on(head, first if head.weight is embedding_of(model).weight else last)


def _put_on(part: nn.Module, device: torch.device) -> None:
    for module in part.modules():
        module.runs_on = device
    fetch_to(part, device)


def fetch_to(part: nn.Module, device: torch.device) -> None:
    """Before each pass of a part, move its input tensors to its device: hidden states, masks, positions."""
    from accelerate.utils import send_to_device

    def fetch(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches its kernels there, wherever their arguments are
        return send_to_device((inputs, named), device, non_blocking=True)

    part.register_forward_pre_hook(fetch, with_kwargs=True)
