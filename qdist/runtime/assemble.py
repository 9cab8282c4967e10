"""Builds what a rank trains, from the plan: its part of the backbone, the adapter on it, and the engine over that."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from qdist.core.plan import Plan
from qdist.runtime.comm import Comm
from qdist.runtime.engine import Adapter, Engine
from qdist.runtime.forward import Evaluate, Forward
from qdist.runtime.measure import disk_read_bytes
from qdist.runtime.methods.backbone import DTYPES, load_backbone
from qdist.runtime.methods.lora import add_adapter, prepare_for_training
from qdist.runtime.methods.skeleton import offload
from qdist.runtime.placements.shard import check_gathered_bytes, settle, shard
from qdist.runtime.placements.split_sequential import spread
from qdist.runtime.placements.stages import arrange_stage
from qdist.runtime.samples import read_samples
from qdist.runtime.setup import make_engine, make_pipeline


class Loaded(NamedTuple):
    """A rank's part of the backbone, and what loading it took."""

    backbone: Any
    seconds: float
    read_bytes: int
    verify: Callable[[], int] | None
    """Gathers a sharded backbone once more; the bytes that were as the ranks hold them. Collective."""
    verified_bytes: int
    summed: bool
    """Whether the packed bytes have recorded sums, which they were held against."""


class Parts(NamedTuple):
    """What the loop and the end of a run need."""

    model: Any
    forward: Forward
    adapter: Adapter
    engine: Engine
    evaluate: Evaluate


def load_part(plan: Plan, comm: Comm, devices: tuple[torch.device, ...]) -> Loaded:
    """Load what this rank holds, and nothing else. Collective where the backbone is sharded.

    devices: this rank's, in the order of its plan.
    Raises RunError where the gathered bytes of a shard differ from those that the ranks hold.
    """
    began, read_before = time.perf_counter(), disk_read_bytes()
    backbone = load_backbone(
        plan.source,
        bits=plan.spec.bits,
        quant=plan.spec.quant,
        dtype=DTYPES[plan.compute_dtype],
        device=devices[0],
        linear_names=plan.facts.linear_names,
        arrange=partial(_arrange, plan, comm, devices),
        share=_share(plan, comm.rank),
    )
    verify = None
    if plan.placement == "shard":
        settle(backbone)
        verify = partial(check_gathered_bytes, backbone)
    verified = verify() if verify else 0
    return Loaded(
        backbone,
        time.perf_counter() - began,
        disk_read_bytes() - read_before,
        verify,
        verified,
        bool(plan.source.digest),
    )


def _share(plan: Plan, rank: int) -> tuple[int, int]:
    """Which part of the checksums is a rank's: all of its own copy on a GPU; CPU ranks of a node map the same bytes."""
    own = plan.ranks[rank]
    if plan.device == "cuda" or plan.placement != "replicate":
        return 0, 1
    together = [other.rank for other in plan.ranks if other.node == own.node]
    return together.index(rank), len(together)


def _arrange(plan: Plan, comm: Comm, devices: tuple[torch.device, ...], model: Any) -> None:
    """Shard or take away what this rank does not hold, and say where the rest lies, while the model has no bytes."""
    if plan.placement == "shard":
        shard(model, plan)
    elif plan.schedule == "1f1b":
        arrange_stage(plan, comm.rank)(model)
    elif plan.schedule == "sequential":
        spread(model, [devices[position] for position in plan.layer_map])
    offload(model, plan.offloaded_layers)


def assemble(plan: Plan, accelerator: Any, backbone: Any, device: torch.device, *, pad_id: int) -> Parts:
    """The adapter on a loaded backbone and the engine over it. Collective."""
    model = add_adapter(backbone, plan)
    prepare_for_training(model, plan)
    samples = read_samples(plan, pad_id=pad_id)
    forward = Forward(model, samples, dtype=DTYPES[plan.compute_dtype], fused=plan.liger)
    adapter = Adapter(model, forward.loss)
    if plan.schedule == "1f1b":
        pipeline = make_pipeline(plan, accelerator, adapter, forward, device)
        return Parts(model, forward, adapter, pipeline, pipeline.evaluate)
    return Parts(model, forward, adapter, make_engine(plan, accelerator, adapter), forward.evaluate)
