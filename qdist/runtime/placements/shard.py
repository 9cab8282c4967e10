"""A backbone sharded over the ranks of a group with FSDP2: packed bytes gathered layer by layer, just in time."""

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from qdist.core.errors import JobError
from qdist.core.planning.plan import Plan
from qdist.runtime.engine.head import head_rule
from qdist.runtime.engine.objective import cross_entropy
from qdist.runtime.formats.checksum import slice_sums
from qdist.runtime.model.parts import decoder_layers, decoder_of, embedding_of, head_of
from qdist.runtime.model.skeleton import first_row
from qdist.runtime.placements.base import LoneRank


class Shard(LoneRank):
    """A rank that holds 1/k of every layer's packed bytes. The group gathers them together, layer by layer."""

    in_step = True

    @property
    def can_answer(self) -> bool:
        return True

    def arrange(self, model: Any) -> None:
        shard(model, self.plan)

    def settle(self, backbone: Any) -> None:
        settle(backbone)
        if self.plan.liger and shards_embeddings(self.plan) and head_rule(backbone).plain:
            # The fused loss has computed its gradient when the backward pass begins.
            _keep_out_of_backward(head_of(backbone))

    def verify(self, backbone: Any) -> int:
        return check_gathered_bytes(backbone)


def shard(model: Any, plan: Plan) -> None:
    """Shard a model on the meta device: one unit per decoder layer, and the embeddings unless needed elsewhere.

    Only the frozen backbone is FSDP's. Adapters are put on later and stay out of its sight.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    _allow_integers()
    mesh = _group_mesh(plan)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    embedding, head = embedding_of(model), head_of(model)
    whole: set[nn.Parameter] = set()
    if shards_embeddings(plan):
        for table in (embedding, head):
            fully_shard(table, mesh=mesh, reshard_after_forward=True)
        head.cross_entropy = MethodType(cross_entropy, head)
        register_fsdp_forward_method(head, "cross_entropy")
        _keep_out_of_backward(embedding)
    else:
        whole.update(embedding.parameters(), head.parameters())
    fully_shard(decoder_of(model), mesh=mesh, reshard_after_forward=False, ignored_params=whole)


def _keep_out_of_backward(table: Any) -> None:
    """Keep FSDP from gathering a table in the backward pass, which does not read it.

    Of the embeddings this is more than a saving: nothing below them is trained, so no backward pass ever comes to them,
    yet FSDP2 gathers them ahead of it. At the end of the pass it means the stream to wait for that gather, but waits
    through `torch.accelerator.current_stream()` on an event of CUDA's own kind, which is no wait at all (torch 2.11).
    The gather's buffer is given to the next pass while it is still being filled: wrong norms, wrong embeddings.
    """
    table.set_unshard_in_backward(False)


def shards_embeddings(plan: Plan) -> bool:
    """Whether embeddings are sharded: tied tables and those with added rows stay whole on every rank."""
    return not plan.facts.tied_embeddings and plan.source.vocab_rows is None


def _group_mesh(plan: Plan) -> DeviceMesh:
    """The ranks that together hold one backbone."""
    if plan.groups == 1:  # the ranks of the run, whose communicator there is already
        return init_device_mesh(plan.device, (plan.gpus_per_group,), mesh_dim_names=("shard",))
    mesh = init_device_mesh(plan.device, (plan.groups, plan.gpus_per_group), mesh_dim_names=("group", "shard"))
    return mesh["shard"]


def settle(model: Any) -> None:
    """Have FSDP adopt shards that were filled in after it wrapped the model without storage."""
    # Loading a state dict makes every unit look at its parameters again; an empty one changes none.
    model.load_state_dict({}, strict=False)


def check_gathered_bytes(model: Any) -> int:
    """Gather every unit once and compare its packed bytes with what the ranks hold; returns the bytes compared.

    FSDP2 with bf16 or fp16 storage, as is often advised, changes packed bytes: CUDA copies rewrite NaN patterns.
    Raises JobError naming the tensor. Collective.
    """
    from torch.distributed.fsdp import FSDPModule

    checked = 0
    for path, unit in model.named_modules():
        if not isinstance(unit, FSDPModule):
            continue
        held = {name: parameter for name, parameter in unit.named_parameters() if isinstance(parameter, DTensor)}
        unit.unshard()
        for name, parameter in unit.named_parameters():
            if name not in held or isinstance(parameter, DTensor):  # whole anyway, or of a unit inside this one
                continue
            gathered = parameter.detach().contiguous().view(-1).view(torch.uint8)
            if not torch.equal(slice_sums(gathered, 0), _held_sums(held[name])):
                raise JobError(
                    f"{path}.{name}: the bytes gathered from the ranks are not the bytes that they hold",
                    try_="--placement replicate or split, and report this with the output of qdist doctor",
                )
            checked += gathered.numel()
        unit.reshard()
    return checked


def _held_sums(parameter: DTensor) -> torch.Tensor:
    """Checksum of a sharded parameter's bytes from each rank's own rows, summed over the group; int64 [2]."""
    local = parameter.to_local()
    row_bytes = local.element_size() * (parameter.numel() // parameter.shape[0])
    sums = slice_sums(local.contiguous().view(torch.uint8).flatten(), first_row(parameter) * row_bytes)
    dist.all_reduce(sums, group=parameter.device_mesh.get_group())
    return sums


def _allow_integers() -> None:
    """Work around torch 2.11: FSDP2 makes sharded parameters without `requires_grad`, which integer tensors refuse.

    https://github.com/pytorch/pytorch/issues/177844; docs/upstream.md.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    if torch.__version__ >= torch.torch_version.TorchVersion("2.12") or isinstance(_fsdp_param.nn, _IntegerNn):
        return
    _fsdp_param.nn = _IntegerNn()


class _IntegerNn:
    """`torch.nn` with a `Parameter` that requires gradients only for tensors that can have them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)

    @staticmethod
    def Parameter(data: torch.Tensor, requires_grad: bool | None = None) -> nn.Parameter:
        wanted = data.is_floating_point() if requires_grad is None else requires_grad
        return nn.Parameter(data, requires_grad=wanted)
