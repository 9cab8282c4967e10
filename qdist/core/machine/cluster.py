"""What machine is there, or would be there."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from qdist.core.errors import Change, SpecError
from qdist.core.machine.kernel_rates import KernelRates, usual_kernel_rates
from qdist.core.text import GIB, format_bytes, parse_bytes

LINEAR_S = 0.65e-3
"""Seconds to launch an adapted 4-bit linear, both passes (a virtual machine with H200s)."""
UNNAMED = "hypothetical GPU"
"""Name of a card that was given none."""
MOST_RANKS = 256
"""Most ranks on one machine, real or hypothetical."""
_USUAL_HOST_BYTES = 64 * GIB
"""Bytes of host memory assumed for a machine with a GPU, unless its GPUs are large."""


class Rates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How fast a GPU and its links are. Bytes count once for each direction in which they move."""

    matmul_flops_s: float
    """FLOP/s of dense 16-bit matrix products."""
    memory_bytes_s: float
    """Bytes/s of device memory, reads plus writes."""
    link_bytes_s: float
    """Bytes/s that one GPU receives in an all-gather over the GPUs of the machine."""
    host_bytes_s: float
    """Bytes/s from pinned host memory to one GPU."""
    linear_s: float = LINEAR_S
    """CPU seconds to launch the kernels of an adapted 4-bit linear, both passes; bounds small micro-batches."""
    kernels: KernelRates | None = None
    """Rates of the kernels of a step; None where nobody measured them."""
    source: str
    """Where the figures come from: 'measured' and the date, or 'table'."""

    @property
    def of_kernels(self) -> KernelRates:
        """Rates of the kernels of a step: as measured, or as the card's other figures have them."""
        return self.kernels or usual_kernel_rates(self.matmul_flops_s, self.memory_bytes_s)


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU as CUDA numbers it for this process, so after CUDA_VISIBLE_DEVICES and in PCI bus order."""

    index: int
    name: str
    total_bytes: int
    """Bytes available to programs: physical memory less what driver and firmware keep."""
    free_bytes: int
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None if the driver does not say, and of cards that are only described."""


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The network between the nodes of a run."""

    bytes_s: float
    """Bytes/s that a node sends to another while it receives as many."""
    latency_s: float
    """Seconds from one node to another, one way."""
    source: str
    """Where the figures come from: 'measured' and the date, 'given', or 'assumed'."""


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node of several."""

    name: str
    gpus: int
    """GPUs of it that the run may use; CPU ranks where there are no GPUs."""


class Cluster(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine, or several nodes of one kind of device. `gpus` is empty exactly when `device` is 'cpu'.

    Of several nodes, `gpus` are those of all, node by node, numbered on their nodes; cores and host memory are those
    of the node that has least.
    """

    device: Literal["cuda", "cpu"]
    gpus: tuple[Gpu, ...]
    cpu_count: int
    """Cores that this process may run on, not cores of the machine."""
    memory_bytes: int
    """Bytes of host memory, capped by the cgroup."""
    memory_free_bytes: int
    rates: Rates | None = None
    """Rates of the slowest GPU; None on CPU and for an unknown card."""
    described: bool = False
    """Whether it is a machine to plan for, not this one."""
    nodes: tuple[Machine, ...] = ()
    """The nodes, in order; empty for one machine."""
    network: Network | None = None
    """The network between them; None for one machine."""

    @property
    def kinds(self) -> tuple[Gpu, ...]:
        """One GPU of each name and compute capability."""
        return tuple({(gpu.name, gpu.capability): gpu for gpu in self.gpus}.values())


def hypothetical(
    gpus: int, gpu_memory_bytes: int, *, name: str = UNNAMED, host_memory_bytes: int | None = None
) -> Cluster:
    """A machine of equal GPUs that one does not have, to plan for.

    name: of the card, from which the plan knows how fast it is.
    host_memory_bytes: as for `machine_of`.

    Raises SpecError when the machine would have no GPU or no memory.
    """
    if gpus < 1:
        raise SpecError(f"a machine to plan for needs at least 1 GPU, not {gpus}", ways=[{"gpus": 1}])
    if gpus > MOST_RANKS:
        raise SpecError(
            f"a machine to plan for has at most {MOST_RANKS:,} GPUs, not {gpus:,}",
            ways=[{"gpus": count} for count in (64, 8)],
        )
    return machine_of(((name, gpu_memory_bytes),) * gpus, host_memory_bytes=host_memory_bytes)


def machine_of(cards: Sequence[tuple[str, int]], *, host_memory_bytes: int | None = None) -> Cluster:
    """A machine that one does not have, by the name and the bytes of each card. Each is empty and brings 8 cores.

    host_memory_bytes: by default twice what the GPUs have, and at least 64 GiB.

    Raises SpecError when a card has no memory to speak of.
    """
    smallest = min(size for _, size in cards)
    if smallest < GIB:
        raise SpecError(
            f"a GPU of {format_bytes(smallest)} is too small to plan for",
            ways=[{"gpu_memory": f"{gib}GiB"} for gib in (24, 48, 80)],
        )
    host_bytes = host_memory_bytes or max(_USUAL_HOST_BYTES, 2 * sum(size for _, size in cards))
    return Cluster(
        device="cuda",
        gpus=tuple(
            Gpu(index=index, name=name, total_bytes=size, free_bytes=size) for index, (name, size) in enumerate(cards)
        ),
        cpu_count=8 * len(cards),
        memory_bytes=host_bytes,
        memory_free_bytes=host_bytes,
        described=True,
    )


def changed(cluster: Cluster, change: Change, gpus: int | None) -> Cluster:
    """The machine with a change to it. gpus: of the run; a machine that is only described has what is asked for."""
    if "gpu_memory" in change:
        each = parse_bytes(change["gpu_memory"], "gpu_memory")
        larger = tuple(msgspec.structs.replace(gpu, total_bytes=each, free_bytes=each) for gpu in cluster.gpus)
        cluster = msgspec.structs.replace(cluster, gpus=larger) if larger else hypothetical(gpus or 1, each)
    if cluster.described and "gpus" in change:
        nodes = tuple(msgspec.structs.replace(node, gpus=gpus or 1) for node in cluster.nodes)
        many = [msgspec.structs.replace(cluster.gpus[0], index=index) for index in range(gpus or 1)]
        cluster = msgspec.structs.replace(cluster, gpus=tuple(many * max(1, len(nodes))), nodes=nodes)
    if "host_memory" in change:
        cluster = msgspec.structs.replace(cluster, memory_bytes=parse_bytes(change["host_memory"], "host_memory"))
    return cluster


def joined(
    clusters: Sequence[Cluster], names: Sequence[str], gpus: Sequence[int | None], network: Network | None
) -> Cluster:
    """Machines as nodes of one run. gpus: that each may use; None for all, or for one CPU rank.

    Raises SpecError where some have GPUs and others have none, or one lacks the GPUs asked of it.
    """
    devices = {cluster.device for cluster in clusters}
    if len(devices) > 1:
        lacking = next(name for name, own in zip(names, clusters, strict=True) if own.device == "cpu")
        raise SpecError(f"{lacking} has no GPU, and other nodes have", try_=f"leave {lacking} out")
    counts = [wanted or len(own.gpus) or 1 for wanted, own in zip(gpus, clusters, strict=True)]
    for name, own, count in zip(names, clusters, counts, strict=True):
        if own.device == "cuda" and count > len(own.gpus):
            raise SpecError(f"{name} has {len(own.gpus)} GPUs, and the run is to use {count} there", try_="fewer GPUs")
    rates = [own.rates for own in clusters if own.rates]
    known = len(rates) == len(clusters)  # a card of which nothing is known may be slower than all others
    slowest = min(rates, key=lambda each: each.matmul_flops_s) if known else None
    return Cluster(
        device=clusters[0].device,
        gpus=tuple(gpu for own, count in zip(clusters, counts, strict=True) for gpu in own.gpus[:count]),
        cpu_count=min(own.cpu_count for own in clusters),
        memory_bytes=min(own.memory_bytes for own in clusters),
        memory_free_bytes=min(own.memory_free_bytes for own in clusters),
        rates=slowest,
        described=clusters[0].described,
        nodes=tuple(Machine(name=name, gpus=count) for name, count in zip(names, counts, strict=True)),
        network=network,
    )
