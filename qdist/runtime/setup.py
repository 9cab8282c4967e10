"""Brings up one rank from the rendered files: Accelerate's state, the process group, the engine."""

import datetime
import json
from functools import partial
from typing import Any

import torch

from qdist.core.errors import PlanError, RunError
from qdist.core.plan import Plan
from qdist.core.render import ACCELERATE_FILE
from qdist.host import shared_gpus
from qdist.host.rundir import RunDir
from qdist.runtime.deepspeed_engine import DeepSpeedEngine
from qdist.runtime.engine import Adapter, Engine, TorchEngine, build_optimizer
from qdist.runtime.forward import Forward

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
    from qdist.runtime.placements.pipeline import Pipeline
    from qdist.runtime.placements.split import make_grid
    from qdist.runtime.placements.split_engine import PipelineEngine, deepspeed_over_stage

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
    sharing = shared_gpus.ranks_per_gpu()
    shared_gpus.take_turns(local_rank, sharing)
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
