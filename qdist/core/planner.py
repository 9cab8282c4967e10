"""Makes the plan from what the user wants and what the machine is. Pure."""

import math
from collections.abc import Callable
from typing import Literal

import msgspec

from qdist.core.cluster import Cluster
from qdist.core.errors import PlanError, SpecError
from qdist.core.facts import ModelFacts
from qdist.core.memory import MemoryBudget, budget
from qdist.core.plan import DataFacts, Plan, RankPlan, Source
from qdist.core.spec import RunSpec, max_memory_bytes
from qdist.core.units import GIB, MIB, format_bytes

CUDA_CONTEXT_BYTES = 830 * MIB
"""CUDA context, kernels and cuBLAS workspaces of one rank (H200: used less what torch reserved)."""
NCCL_BYTES = 1270 * MIB
"""What NCCL takes of each GPU of an NVLink pair (2 H200s: the same, less one GPU's context and paged moments)."""
CPU_CONTEXT_BYTES = 460 * MIB
"""Resident memory of a CPU rank that has imported torch, transformers, peft and DeepSpeed and loaded nothing."""
CPU_LOADING_BYTES = 4
"""A parameter of a CPU rank: its 16-bit file stays mapped, and as much again is what the allocator keeps of packing."""
HEADROOM = 0.95
"""Share of a GPU that a plan may fill."""
SATURATING_TOKENS = 2048
"""Tokens of a micro-batch above which a current GPU's matrix units are busy."""
MAX_MICRO_BATCH_TOKENS = 8192
"""Tokens of a micro-batch beyond which throughput no longer grows, only memory."""
MAX_CPU_MICRO_BATCH_TOKENS = 2048

Expected = Callable[[int, bool, int], MemoryBudget]
"""Peak memory of a rank for (micro_batch, checkpointing, bits)."""


def make_plan(
    spec: RunSpec,
    source: Source,
    facts: ModelFacts,
    cluster: Cluster,
    data: DataFacts | None,
    *,
    has_liger: bool = False,
    usual_micro_batch: int | None = None,
) -> Plan:
    """Decide placement, batches, precision and engine.

    usual_micro_batch: what the run had before it was resumed. It is kept where the ranks allow, since dropout is drawn
    for each micro-batch.

    Raises PlanError, with the missing bytes and the nearest settings that fit, when the run does not fit, and
    SpecError where the batch arithmetic cannot work out.
    """
    world_size = _world_size(spec, cluster)
    dtype = spec.dtype or ("bfloat16" if cluster.device == "cuda" else "float32")
    longest = min(spec.seq_len, data.longest) if data else spec.seq_len
    if longest > facts.max_positions:
        raise SpecError(
            f"seq_len={longest}, but {spec.model} has {facts.max_positions} positions",
            try_=f"seq_len={facts.max_positions}",
        )
    stage = _zero_stage(spec, world_size)
    liger = _liger(spec, cluster, has_liger)
    optimizer = _optimizer(spec, cluster)
    capacity = _capacity(spec, cluster)

    def expected(micro_batch: int, checkpointing: bool, bits: int) -> MemoryBudget:
        return budget(
            facts,
            bits=bits,
            double_quant=spec.quant.double,
            compute_bytes=4 if dtype == "float32" else 2,
            rank_r=spec.lora.r,
            targets=spec.lora.targets,
            micro_batch=micro_batch,
            seq_len=longest,
            checkpointing=checkpointing,
            zero_stage=stage,
            world_size=world_size,
            optimizer_on_gpu=spec.zero.offload == "none",
            paged=optimizer == "paged-adamw",
            gradient_accumulation=max(1, spec.global_batch // (micro_batch * world_size)),
            fused_loss=liger,
            fused_layers=liger,
            lora_dropout=spec.lora.dropout > 0,
            context_bytes=_context_bytes(cluster, facts, world_size),
        )

    if usual_micro_batch and not spec.micro_batch and spec.global_batch % (usual_micro_batch * world_size) == 0:
        wanted = msgspec.structs.replace(spec, micro_batch=usual_micro_batch)
    else:
        wanted = spec
    micro_batch, checkpointing, notes = _batches(wanted, world_size, capacity, expected)
    peak = expected(micro_batch, checkpointing, spec.bits)
    if capacity is not None and peak.required > capacity:
        raise _too_big(spec, capacity, peak, expected)
    if cluster.device == "cpu" and peak.total * world_size > cluster.memory_bytes:
        raise PlanError(
            f"{spec.model} at {spec.bits} bits on {world_size} CPU rank{'s' if world_size > 1 else ''} needs "
            f"{format_bytes(peak.total * world_size)}; this machine has {format_bytes(cluster.memory_bytes)}, no GPU",
            try_=f"--gpus {fitting}" if (fitting := cluster.memory_bytes // peak.total) else _elsewhere(spec),
        )
    return Plan(
        spec=spec,
        source=source,
        facts=facts,
        data=data,
        device=cluster.device,
        groups=world_size,
        gpus_per_group=1,
        world_size=world_size,
        micro_batch=micro_batch,
        gradient_accumulation=spec.global_batch // (micro_batch * world_size),
        steps=_steps(spec, data),
        seq_len=longest,
        checkpointed_layers=facts.layers if checkpointing else 0,
        compute_dtype=dtype,
        optimizer=optimizer,
        engine="deepspeed" if world_size > 1 or spec.zero.stage or spec.zero.offload == "cpu" else "torch",
        zero_stage=stage,
        liger=liger,
        threads_per_rank=max(1, cluster.cpu_count // world_size),
        memory_cap_bytes=max_memory_bytes(spec),
        ranks=tuple(
            RankPlan(rank=rank, node=0, gpus=(rank,) if cluster.device == "cuda" else (), expected=(peak,), group=rank)
            for rank in range(world_size)
        ),
        notes=notes,
    )


def _world_size(spec: RunSpec, cluster: Cluster) -> int:
    if cluster.device == "cpu":
        return spec.gpus or 1
    if spec.gpus is not None and spec.gpus > len(cluster.gpus):
        raise PlanError(
            f"--gpus {spec.gpus}, but this machine has {len(cluster.gpus)}", try_=f"--gpus {len(cluster.gpus)}"
        )
    return spec.gpus or len(cluster.gpus)


def _optimizer(spec: RunSpec, cluster: Cluster) -> Literal["adamw", "paged-adamw"]:
    """Paged AdamW on GPUs, whose state may leave them under pressure; plain AdamW where it lies on the CPU anyway."""
    on_gpu = cluster.device == "cuda" and spec.zero.offload == "none"
    if spec.optim.name == "paged-adamw" and not on_gpu:
        where = "a GPU" if cluster.device == "cpu" else "zero.offload=none"
        raise SpecError(
            f"optim.name=paged-adamw needs {where}: it pages optimizer state out of GPU memory", try_="optim.name=adamw"
        )
    return spec.optim.name or ("paged-adamw" if on_gpu else "adamw")


def _context_bytes(cluster: Cluster, facts: ModelFacts, world_size: int) -> int:
    """What a rank holds beside what the budget counts."""
    if cluster.device == "cpu":
        return CPU_CONTEXT_BYTES + CPU_LOADING_BYTES * facts.parameters
    return CUDA_CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0)


def _elsewhere(spec: RunSpec) -> str:
    """What to do when not even one CPU rank fits."""
    return f"a smaller model; for another machine: qdist plan --model {spec.model} --gpus 1 --gpu-memory 24GiB"


def _zero_stage(spec: RunSpec, world_size: int) -> int:
    if spec.zero.stage is not None:
        return spec.zero.stage
    return 2 if world_size > 1 or spec.zero.offload == "cpu" else 0


def _liger(spec: RunSpec, cluster: Cluster, has_liger: bool) -> bool:
    if spec.liger and cluster.device == "cpu":
        raise SpecError("liger=true needs a GPU: its kernels are written in Triton", try_="liger=false")
    if spec.liger and not has_liger:
        raise SpecError("liger=true, but the package liger-kernel is not installed", try_="pip install liger-kernel")
    return cluster.device == "cuda" and has_liger if spec.liger is None else spec.liger


def _capacity(spec: RunSpec, cluster: Cluster) -> int | None:
    """Bytes that one rank may fill; None on CPU, where ranks share the machine's memory."""
    if cluster.device == "cpu":
        if spec.max_memory is not None:
            raise SpecError("--max-memory caps GPUs, and this machine has none", try_="leave --max-memory out")
        return None
    smallest = min(gpu.total_bytes for gpu in cluster.gpus)
    cap = max_memory_bytes(spec)
    if cap is not None and cap > smallest:
        raise PlanError(
            f"--max-memory {format_bytes(cap)}, but the smallest GPU has {format_bytes(smallest)}",
            try_=f"--max-memory {smallest // GIB}GiB or less",
        )
    return int(HEADROOM * (cap or smallest))


def _batches(
    spec: RunSpec, world_size: int, capacity: int | None, expected: Expected
) -> tuple[int, bool, tuple[str, ...]]:
    """(micro_batch, checkpointing, notes): the fastest pair that fits, or the smallest where none does.

    Storing activations costs 4 multiplications a weight and token instead of 6, so it wins wherever a micro-batch
    of SATURATING_TOKENS still fits; below that the GPU idles and recomputing with a larger micro-batch wins.
    """
    if spec.global_batch % world_size:
        raise SpecError(
            f"global_batch={spec.global_batch} cannot be spread over {world_size} ranks",
            try_=f"--set global_batch={-(-spec.global_batch // world_size) * world_size}",
        )
    per_rank = spec.global_batch // world_size
    if spec.micro_batch is not None and per_rank % spec.micro_batch:
        raise SpecError(
            f"{world_size} ranks x micro_batch={spec.micro_batch} does not divide global_batch={spec.global_batch}",
            try_=f"--set micro_batch={_largest_divisor(per_rank, spec.micro_batch)}",
        )
    sizes = [spec.micro_batch] if spec.micro_batch else [n for n in range(per_rank, 0, -1) if per_rank % n == 0]
    modes = [False, True] if spec.train.checkpointing is None else [spec.train.checkpointing]
    seq_len = spec.seq_len
    if spec.micro_batch is None:
        ceiling = MAX_MICRO_BATCH_TOKENS if capacity is not None else MAX_CPU_MICRO_BATCH_TOKENS
        sizes = [n for n in sizes if n * seq_len <= ceiling] or [1]

    def fits(size: int, checkpointing: bool) -> bool:
        return capacity is None or expected(size, checkpointing, spec.bits).required <= capacity

    saturating = min(sizes[0], max(1, SATURATING_TOKENS // seq_len))
    order = [(n, mode) for mode in modes for n in sizes if n >= saturating or mode == modes[-1]]
    order += [(n, mode) for mode in modes for n in sizes]
    for size, checkpointing in order:
        if fits(size, checkpointing):
            return size, checkpointing, _batch_notes(spec, size, checkpointing, order, expected, capacity)
    return sizes[-1], modes[-1], ()


def _batch_notes(
    spec: RunSpec,
    size: int,
    checkpointing: bool,
    order: list[tuple[int, bool]],
    expected: Expected,
    capacity: int | None,
) -> tuple[str, ...]:
    """Why what was tried before the chosen pair lost."""
    if capacity is None or order[0] == (size, checkpointing):
        return ()
    first_size, first_mode = order[0]
    return (
        f"micro_batch {first_size} {'with' if first_mode else 'without'} checkpointing needs "
        f"{format_bytes(expected(first_size, first_mode, spec.bits).required)} a GPU, "
        f"more than {format_bytes(capacity)}: "
        f"micro_batch {size} {'with' if checkpointing else 'without'} checkpointing",
    )


def _largest_divisor(number: int, at_most: int) -> int:
    return next(n for n in range(min(number, at_most), 0, -1) if number % n == 0)


def _steps(spec: RunSpec, data: DataFacts | None) -> int:
    """Steps of the run: as told, or the epochs (one, unless told) over the training samples, rounded up."""
    if spec.steps is not None:
        return spec.steps
    if data is None or data.train_samples == 0:
        raise SpecError("synthetic data have no epochs", try_="--set steps=20")
    return math.ceil((spec.epochs or 1.0) * data.train_samples / spec.global_batch)


def _too_big(spec: RunSpec, capacity: int, peak: MemoryBudget, expected: Expected) -> PlanError:
    cap = f"{'--max-memory ' if spec.max_memory else ''}{format_bytes(capacity / HEADROOM)}"
    message = (
        f"{spec.model} at {spec.bits} bits needs {format_bytes(peak.required)} on every GPU; 95 % of "
        f"{cap} is {format_bytes(capacity)}, {format_bytes(peak.required - capacity)} short"
    )
    settings = ["--set micro_batch=1"] if spec.micro_batch not in (None, 1) else []
    settings += ["--set train.checkpointing=true"] if spec.train.checkpointing is False else []
    smallest = expected(1, True, spec.bits).required
    if smallest > capacity and spec.bits > 4:
        settings, smallest = ["--bits 4", *settings], expected(1, True, 4).required
    if smallest > capacity:
        needed = math.ceil(smallest / HEADROOM / GIB)
        larger = f"--max-memory {needed}GiB" if spec.max_memory else f"GPUs of {needed} GiB"
        settings = [larger, *(["with"] if settings and not spec.max_memory else []), *settings]
        message += "; every GPU holds the whole model, so more of them do not help"
    return PlanError(message, try_=f"{' '.join(settings)} ({format_bytes(smallest)})")
