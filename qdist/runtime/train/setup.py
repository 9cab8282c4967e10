"""Brings up one rank from the rendered files: Accelerate's state, process group, backbone, adapter, engine."""

import json
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qdist.core.errors import RunError
from qdist.core.machine.world import Rank
from qdist.core.planning.graphs import own_dropout
from qdist.core.planning.plan import Plan, Start
from qdist.core.planning.render import ACCELERATE_FILE
from qdist.core.spec.run_spec import memory_cap_of
from qdist.host.machine import probe
from qdist.host.run.rundir import RunDir
from qdist.host.sources.adapters import digest_of
from qdist.host.sources.targets import ADAPTER
from qdist.runtime.adapters.attach import add_adapter, fill_adapter
from qdist.runtime.data.batches import read_samples
from qdist.runtime.engine.objective import Evaluate, Forward, ScoreBatches
from qdist.runtime.engine.torch import Adapter, Engine
from qdist.runtime.model.causal import take_whole_rows
from qdist.runtime.model.dropout_seed import dropout_seed_of
from qdist.runtime.model.packed import set_compute
from qdist.runtime.model.parts import decoder_layers
from qdist.runtime.model.skeleton import DTYPES, load_backbone
from qdist.runtime.placements.base import PROCESS_GROUP_TIMEOUT, Placement
from qdist.runtime.placements.liger import take_liger
from qdist.runtime.train.checkpoint import load_tensors
from qdist.runtime.train.group import join_group
from qdist.runtime.train.measure import disk_read_bytes
from qdist.runtime.train.result import check_adapter


def make_accelerator(plan: Plan, run: RunDir) -> Any:
    """Accelerate's `Accelerator`, from the run's accelerate.json and the deepspeed.json that it names.

    Naming the backend matters on the CPU: left to itself, Accelerate 1.15 sees one process of DeepSpeed's many.
    """
    from accelerate import Accelerator
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    path = run.path / ACCELERATE_FILE
    config = load_config_from_file(str(path))
    options: dict[str, Any] = {"mixed_precision": config.mixed_precision}
    if str(config.distributed_type).endswith("DEEPSPEED"):
        section = config.deepspeed_config
        policy = json.loads((run.path / section["deepspeed_config_file"]).read_text())
        _compile_nothing()
        options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=policy, zero3_init_flag=section["zero3_init_flag"])
        options["gradient_accumulation_steps"] = policy["gradient_accumulation_steps"]
    else:
        options["cpu"] = config.use_cpu
    if plan.graphs and plan.placement == "shard":
        # NCCL would have all ranks register the buffers of each graph together, which was never tried.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    if config.num_processes > 1:
        backend = "gloo" if config.use_cpu else "nccl"
        options["kwargs_handlers"] = [InitProcessGroupKwargs(backend=backend, timeout=PROCESS_GROUP_TIMEOUT)]
    join_group(plan)
    accelerator = Accelerator(**options)
    # ZeRO-3 partitions the adapter alone: transformers, told of it, would partition the backbone while loading.
    unset_hf_deepspeed_config()
    if accelerator.num_processes != config.num_processes:
        raise RunError(
            f"{path} says {config.num_processes} processes, this run has {accelerator.num_processes}", try_="--resume"
        )
    return accelerator


def _compile_nothing() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce for CPU ranks on the first run.

    That takes over a minute and a C++ compiler, which a machine with Python alone does not have; gloo does without.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def pick_devices(plan: Plan, number: Rank) -> tuple[torch.device, ...]:
    """The devices of a rank of this node in the order of its plan, the memory of each capped as planned."""
    if plan.device == "cpu":
        torch.set_num_threads(plan.threads_per_rank)
        return (torch.device("cpu"),)
    torch.backends.cuda.matmul.allow_tf32 = True
    sharing = probe.ranks_per_gpu()
    probe.take_turns(number, sharing)
    rank = plan.ranks[number]
    devices = tuple(torch.device("cuda", gpu // sharing) for gpu in rank.gpus)
    torch.cuda.set_device(devices[0])
    for gpu, device, expected in zip(rank.gpus, devices, rank.expected, strict=True):
        cap = memory_cap_of(plan.spec, gpu)
        if cap is not None:
            # The cap is on the whole GPU; torch can only be held to what the CUDA context and NCCL leave of it.
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (cap - expected.context) / total), device)
    return devices


def _start_from(start: Start, model: Any) -> None:
    """Initialize a model's adapter, or the part of it on this rank, from another adapter.

    Rows of new tokens that the other lacks stay as they are. Raises RunError if it is not the planned one any more.
    """
    folder = Path(start.path)
    if digest_of(folder) != start.digest:
        raise RunError(f"{folder} has changed since the run was planned", try_="put that adapter back, and --resume")
    _fill_from(folder, model)


def _fill_from(folder: Path, model: Any) -> None:
    tensors = load_tensors(folder / ADAPTER)
    check_adapter(tensors, where=str(folder))
    lacking, _ = fill_adapter(model, tensors)
    if lacking:
        raise RunError(f"{folder} has no tensor {lacking[0]}", try_="another --adapter, in a new run")


def put_on(folder: Path, backbone: Any, plan: Plan) -> None:
    """Put a finished adapter, or the part of it on this rank, on a loaded backbone, in place."""
    _fill_from(folder, add_adapter(backbone, plan))
    backbone.eval()


class Loaded(NamedTuple):
    """A rank's part of the backbone, and statistics of loading it."""

    backbone: Any
    seconds: float
    read_bytes: int
    verified_bytes: int
    """Bytes gathered once and compared; see `Placement.verify`."""
    summed: bool
    """Whether the packed bytes were verified against recorded checksums."""


class Assembled(NamedTuple):
    """What the training loop and the end of a run need."""

    model: Any
    forward: Forward
    adapter: Adapter
    engine: Engine
    evaluate: Evaluate
    score: ScoreBatches


def load_part(place: Placement) -> Loaded:
    """Load only what this rank holds. Collective if ranks hold parts of a layer.

    Raises JobError where gathered bytes differ from those that the ranks hold.
    """
    plan = place.plan
    began, read_before = time.perf_counter(), disk_read_bytes()
    backbone = load_backbone(
        plan.source,
        bits=plan.spec.bits,
        quant=plan.spec.quant,
        dtype=DTYPES[plan.compute_dtype],
        device=place.devices[0],
        facts=plan.facts,
        arrange=place.arrange,
        share=place.sums_share(),
    )
    place.settle(backbone)
    verified = place.verify(backbone)
    seconds, read = time.perf_counter() - began, disk_read_bytes() - read_before
    return Loaded(backbone, seconds, read, verified, bool(plan.source.digest))


def assemble(
    place: Placement, accelerator: Any, backbone: Any, *, pad_id: int, start: Start | None = None
) -> Assembled:
    """Attach the adapter to a loaded backbone and build the engine. Collective.

    start: whose tensors the adapter has at first, instead of PEFT's.
    """
    plan = place.plan
    model = add_adapter(backbone, plan)
    if start:
        _start_from(start, model)
    prepare_for_training(model, plan)
    samples = read_samples(plan, pad_id=pad_id)
    forward = Forward(model, samples, dtype=DTYPES[plan.compute_dtype], fused=plan.liger)
    forward.check()
    adapter = Adapter(model, forward.loss)
    return Assembled(model, forward, adapter, *place.build(accelerator, adapter, forward))


def prepare_for_training(model: Any, plan: Plan) -> None:
    """Gradient checkpointing (non-reentrant), fused kernels and the arithmetic of frozen products, as planned."""
    base = model.get_base_model()
    if plan.device == "cuda":
        take_whole_rows(base)
    if plan.spec.compute:
        set_compute(base, plan.spec.compute)
    if plan.liger:
        take_liger(base)
    if plan.checkpointing:
        checkpoint_layers(model, plan.checkpointed_layers, graphs=plan.graphs)
    model.train()


def checkpoint_layers(model: Any, count: int, *, graphs: bool = False) -> None:
    """Recompute the first `count` decoder layers in the backward pass; transformers' way, or ours where it has none.

    graphs: whether the passes are to be captured, where torch's random state cannot be read. A model that draws from it
    keeps it all the same: CUDA then refuses the capture, and the run says so.
    """
    base = model.get_base_model()
    layers = decoder_layers(base)
    settings = {
        "use_reentrant": False,
        "context_fn": dropout_seed_of(model).contexts,
        "preserve_rng_state": not graphs or has_own_dropout(base),
    }
    if base.supports_gradient_checkpointing and all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        model.gradient_checkpointing_enable(settings)
        for layer in layers[count:]:
            layer.gradient_checkpointing = False
        return
    for layer in layers[:count]:
        layer.forward = partial(_recomputed, layer, layer.forward, settings)


def has_own_dropout(base: Any) -> bool:
    """Whether a model drops something out in training, its adapters aside: also where its class says so by default."""
    modules = (module for path, module in base.named_modules() if "lora_dropout" not in path)
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules):
        return True
    return bool(own_dropout(base.config.get_text_config(decoder=True).to_dict()))


def _recomputed(layer: Any, forward: Callable[..., Any], settings: Mapping[str, Any], *given: Any, **named: Any) -> Any:
    if not layer.training:
        return forward(*given, **named)
    return checkpoint(forward, *given, **settings, **named)
