"""Brings up one rank from the rendered files: Accelerate's state, process group, backbone, adapter, engine."""

import datetime
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from qdist.core.errors import PlanError, RunError
from qdist.core.planning.plan import Plan
from qdist.core.planning.render import ACCELERATE_FILE
from qdist.host.machine import probe
from qdist.host.run.rundir import RunDir
from qdist.runtime.adapters.lora import add_adapter, prepare_for_training
from qdist.runtime.data.batches import read_samples
from qdist.runtime.engine.comm import Comm
from qdist.runtime.engine.deepspeed import DeepSpeedEngine
from qdist.runtime.engine.objective import Evaluate, Forward
from qdist.runtime.engine.torch import Adapter, Engine, TorchEngine, build_optimizer
from qdist.runtime.model.skeleton import DTYPES, load_backbone, offload
from qdist.runtime.placements.shard import check_gathered_bytes, settle, shard
from qdist.runtime.placements.split.sequential import spread
from qdist.runtime.placements.split.stages import arrange_stage
from qdist.runtime.train.measure import disk_read_bytes

PROCESS_GROUP_TIMEOUT = datetime.timedelta(minutes=30)
"""Long enough for rank 0 to write answers and checkpoints while the others wait."""


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
    if config.num_processes > 1:
        backend = "gloo" if config.use_cpu else "nccl"
        options["kwargs_handlers"] = [InitProcessGroupKwargs(backend=backend, timeout=PROCESS_GROUP_TIMEOUT)]
    accelerator = Accelerator(**options)
    # ZeRO-3 partitions the adapter alone: transformers, told of it, would partition the backbone while loading.
    unset_hf_deepspeed_config()
    if accelerator.num_processes != config.num_processes:
        raise RunError(
            f"{path} says {config.num_processes} processes, this run has {accelerator.num_processes}", try_="--resume"
        )
    return accelerator


def _compile_nothing() -> None:
    """Keep DeepSpeed from building its shared-memory all-reduce for CPU ranks on the first run.

    That takes over a minute and a C++ compiler, which a machine with Python alone does not have; gloo does without.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_engine(plan: Plan, accelerator: Any, adapter: Adapter) -> Engine:
    """The engine that the plan names, over the adapter's parameters alone."""
    clip, optimizer_of = plan.spec.optim.clip, _optimizer_of(plan)
    if plan.engine == "torch":
        optimizer = optimizer_of(list(adapter.parameters()))
        return TorchEngine(adapter, optimizer, clip=clip, ranks=plan.data_parallel)
    engine, _ = accelerator.prepare(adapter, optimizer_of(list(adapter.parameters())))
    return DeepSpeedEngine(adapter, engine, clip=clip)


def make_pipeline(plan: Plan, accelerator: Any, adapter: Adapter, forward: Forward, device: torch.device) -> Any:
    """The `PipelineEngine` of a rank of a split plan whose ranks are stages. Collective.

    forward: over a model that holds this rank's stage alone; see `stages.arrange_stage`.
    """
    from qdist.runtime.placements.split.engine import PipelineEngine, deepspeed_over_stage
    from qdist.runtime.placements.split.pipeline import Pipeline
    from qdist.runtime.placements.split.stages import make_grid

    if plan.zero_stage == 3:
        raise PlanError("ZeRO-3 does not go with split: the stages share no parameters", try_="--set zero.stage=2")
    grid = make_grid(plan, timeout=PROCESS_GROUP_TIMEOUT)
    pipeline = Pipeline(forward, grid, hidden_size=plan.facts.hidden, pad_id=forward.samples.pad_id, device=device)
    clip, optimizer_of = plan.spec.optim.clip, _optimizer_of(plan)
    inner: TorchEngine | DeepSpeedEngine
    if plan.engine == "torch":
        inner = TorchEngine(adapter, optimizer_of(list(adapter.parameters())), clip=clip, across=grid.over_stages)
    else:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        twins, engine = deepspeed_over_stage(adapter, optimizer_of, config, grid)
        inner = DeepSpeedEngine(twins, engine, clip=clip, group=grid.peers, across=grid.over_stages)
    return PipelineEngine(pipeline, adapter, inner)


def _optimizer_of(plan: Plan) -> Any:
    """What makes the planned optimizer over a list of parameters."""
    optim = plan.spec.optim
    return partial(
        build_optimizer,
        name=plan.optimizer,
        fused=plan.device == "cuda" and plan.spec.zero.offload == "none",
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )


def pick_devices(plan: Plan, local_rank: int) -> tuple[torch.device, ...]:
    """This rank's devices in the order of its plan, the memory of each capped as planned."""
    if plan.device == "cpu":
        torch.set_num_threads(plan.threads_per_rank)
        return (torch.device("cpu"),)
    torch.backends.cuda.matmul.allow_tf32 = True
    sharing = probe.ranks_per_gpu()
    probe.take_turns(local_rank, sharing)
    rank = plan.ranks[local_rank]
    devices = tuple(torch.device("cuda", gpu // sharing) for gpu in rank.gpus)
    torch.cuda.set_device(devices[0])
    if plan.memory_cap_bytes is not None:
        for device, expected in zip(devices, rank.expected, strict=True):
            # The cap is on the whole GPU; torch can only be held to what the CUDA context and NCCL leave of it.
            total = torch.cuda.get_device_properties(device).total_memory
            allowed = plan.memory_cap_bytes - expected.context
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)
    return devices


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
