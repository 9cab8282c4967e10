"""What may a run use of a machine: how many GPUs, which dtype, optimizer and kernels, how much of each memory?"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

from qdist.core.errors import PlanError, SpecError
from qdist.core.machine.cards import has_bfloat16, has_fp8
from qdist.core.machine.cluster import MOST_RANKS, Cluster
from qdist.core.model.adapters.registry import ADAPTERS
from qdist.core.model.gptq import Gptq
from qdist.core.model.shapes import ModelFacts
from qdist.core.model.storage import packing_of
from qdist.core.planning.activations import Recurrence
from qdist.core.planning.candidates import USABLE_SHARE
from qdist.core.planning.memory import TrainingShape
from qdist.core.spec.run_spec import RunSpec, memory_cap_of, memory_caps
from qdist.core.spec.sections import Optimizer
from qdist.core.text import GIB, counted, format_bytes


def count_of(spec: RunSpec, cluster: Cluster) -> int:
    """Number of GPUs, or of CPU ranks, of the run."""
    return sum(counts_of(spec, cluster))


def counts_of(spec: RunSpec, cluster: Cluster) -> tuple[int, ...]:
    """Number of GPUs, or of CPU ranks, that the run uses of each node; of one machine, a single number.

    `spec.gpus` are those of each node. Raises SpecError for too many ranks, PlanError for GPUs that are not there.
    """
    if not cluster.nodes:
        return (_count_of_machine(spec, cluster),)
    if spec.gpus is None:
        return tuple(node.gpus for node in cluster.nodes)
    fewest = min(cluster.nodes, key=lambda node: node.gpus)
    if cluster.device == "cuda" and spec.gpus > fewest.gpus:
        raise PlanError(
            f"--gpus {spec.gpus} of each node, but {fewest.name} has {fewest.gpus}",
            ways=[{"gpus": fewest.gpus}, {"gpus": None}],
        )
    _require_possible(spec, cluster)
    return (spec.gpus,) * len(cluster.nodes)


def _require_possible(spec: RunSpec, cluster: Cluster) -> None:
    """Raise SpecError for more ranks of a machine than there can be."""
    if spec.gpus is not None and spec.gpus > MOST_RANKS:
        raise SpecError(
            f"a machine has at most {MOST_RANKS:,} ranks, not {spec.gpus:,}",
            ways=[{"gpus": ranks} for ranks in (cluster.cpu_count, 2, 1)],
        )


def _count_of_machine(spec: RunSpec, cluster: Cluster) -> int:
    if cluster.device == "cpu":
        _require_possible(spec, cluster)
        return spec.gpus or 1
    if spec.gpus is not None and spec.gpus > len(cluster.gpus):
        raise PlanError(
            f"--gpus {spec.gpus}, but this machine has {len(cluster.gpus)}", ways=[{"gpus": len(cluster.gpus)}]
        )
    return spec.gpus or len(cluster.gpus)


def dtype_of(spec: RunSpec, cluster: Cluster) -> Literal["bfloat16", "float16", "float32"]:
    """Compute dtype: the 16-bit one that all GPUs have; float32 on CPUs, which emulate bfloat16 (docs/decisions.md)."""
    if spec.dtype or cluster.device == "cpu":
        return spec.dtype or "float32"
    return "bfloat16" if all(has_bfloat16(gpu.name) for gpu in cluster.kinds) else "float16"


def require_compute(spec: RunSpec, cluster: Cluster) -> None:
    """Raise SpecError where GPUs do not multiply in the arithmetic that is asked for."""
    lacking = next((gpu.name for gpu in cluster.kinds if not has_fp8(gpu)), None)
    if spec.compute and (lacking or cluster.device == "cpu"):
        who = f"which the {lacking} does not have" if lacking else "and this machine has no GPU"
        raise SpecError(
            f"compute={spec.compute} needs matrix units for fp8, {who}: cards from compute capability 8.9 on do, such "
            "as RTX 4090, L40S and H100",
            ways=[{"compute": None}],
        )


def shape_of(
    spec: RunSpec,
    facts: ModelFacts,
    cluster: Cluster,
    *,
    config: Mapping[str, Any],
    gptq: Gptq | None,
    dtype: Literal["bfloat16", "float16", "float32"],
    liger: bool,
    recurrence: Recurrence | None,
) -> TrainingShape:
    """What a spec says of backbone, adapter and kernels, whatever they are used for.

    Raises SpecError for a packing or an adapter method that the model does not have.
    """
    packing = None if gptq else packing_of(spec, config)
    return TrainingShape(
        bits=packing.linear_bits if packing else 4,  # at any width GPTQ unpacks first, as NF4 does
        mxfp4=packing is not None and packing.type == "mxfp4",
        gptq=gptq,
        double_quant=spec.quant.double,
        compute_bytes=4 if dtype == "float32" else 2,
        rank_r=spec.lora.r,
        targets=spec.lora.targets,
        adapter=ADAPTERS[spec.method].of_run(spec, gptq, facts),
        seq_len=spec.seq_len,
        fused_layers=liger,
        fused_lora=True,
        shared_reads=True,
        grouped=cluster.device == "cuda" and dtype == "bfloat16",
        recurrence=recurrence or "torch",
    )


def optimizer_of(spec: RunSpec, cluster: Cluster) -> Optimizer:
    """The one that is set. Otherwise paged AdamW on GPUs, unless a candidate has room for its state, and plain AdamW if
    the state is on the CPU anyway.
    """
    on_gpu = cluster.device == "cuda" and spec.zero.offload == "none"
    if spec.optim.name == "paged-adamw" and not on_gpu:
        where = "a GPU" if cluster.device == "cpu" else "zero.offload=none"
        raise SpecError(
            f"optim.name=paged-adamw needs {where}: it pages optimizer state out of GPU memory",
            ways=[{"optim.name": "adamw"}],
        )
    return spec.optim.name or ("paged-adamw" if on_gpu else "adamw")


def liger_of(spec: RunSpec, cluster: Cluster, has_liger: bool) -> bool:
    """Whether Liger's kernels run: wherever they can, unless set."""
    if spec.liger and cluster.device == "cpu":
        raise SpecError("liger=true needs a GPU: its kernels are written in Triton", ways=[{"liger": False}])
    if spec.liger and not has_liger:
        raise SpecError(
            "liger=true, but the package liger-kernel is not installed: pip install liger-kernel",
            ways=[{"liger": None}],
        )
    return cluster.device == "cuda" and has_liger if spec.liger is None else spec.liger


def recurrence_of(facts: ModelFacts, cluster: Cluster, *, fla: bool) -> Recurrence | None:
    """Which kernel recurrent layers run: flash-linear-attention's on GPUs that can use it; None without any."""
    if not any(shape.mixer == "recurrent" for shape in facts.shapes):
        return None
    return "fla" if fla and cluster.device == "cuda" else "torch"


def rooms_of(spec: RunSpec, cluster: Cluster, counts: Sequence[int]) -> tuple[int, ...] | None:
    """Bytes of each GPU that the plan may fill; None on CPU, where ranks share the machine's memory.

    counts: GPUs of each node, whose caps are by their numbers there.
    """
    caps = memory_caps(spec)
    if cluster.device == "cpu":
        if caps:
            raise SpecError("--max-memory caps GPUs, and this machine has none", ways=[{"max_memory": None}])
        return None
    used = _used(cluster, counts)
    totals, count = [size for _, size in used], max(counts)
    if (last := max((gpu for gpu in caps if gpu is not None), default=0)) >= count:
        raise PlanError(
            f"--max-memory caps GPU {last}, and the last of {counted(count, 'GPU')} is GPU {count - 1}",
            ways=[{"max_memory": spec.max_memory.rpartition("=")[2]}] if spec.max_memory else [],
        )
    for gpu, cap in caps.items():
        most = max(size for number, size in used if gpu in (None, number))
        if cap > most:
            own, which = ("", "the largest GPU") if gpu is None else (f"{gpu}=", f"GPU {gpu}")
            raise PlanError(
                f"--max-memory {own}{format_bytes(cap)}, but {which} has {format_bytes(most)}",
                ways=[{"max_memory": f"{max(totals) // GIB}GiB"}, {"max_memory": None}],
            )
    usable = (min(memory_cap_of(spec, gpu) or total, total) for gpu, total in used)
    return tuple(int(USABLE_SHARE * size) for size in usable)


def _used(cluster: Cluster, counts: Sequence[int]) -> list[tuple[int, int]]:
    """(number on its node, bytes) of each GPU of the run, node by node."""
    there = [node.gpus for node in cluster.nodes] or [len(cluster.gpus)]
    starts = accumulate(there, initial=0)
    return [
        (number, cluster.gpus[start + number].total_bytes)
        for start, count in zip(starts, counts, strict=False)
        for number in range(count)
    ]
