"""What does a run that does not fit lack, and what is the nearest that fits?"""

from collections.abc import Callable, Iterator
from math import ceil
from typing import Any, NamedTuple

import msgspec

from qdist.core.candidates import HEADROOM, Candidate
from qdist.core.cluster import Cluster
from qdist.core.errors import PlanError, QdistError
from qdist.core.ranking import shortage
from qdist.core.spec import RunSpec, Split
from qdist.core.units import GIB, format_bytes

_MORE_GPUS = (2, 4, 8, 16)
_LARGER_GIB = (8, 11, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)

Attempt = Callable[[RunSpec, Cluster], Candidate]
"""The best candidate for a spec on a machine; raises QdistError when there is none."""


Change = tuple[str, dict[str, Any]]
"""Words, and the settings that they change."""


class Way(NamedTuple):
    """A change to what was asked, in the words in which one asks."""

    words: str
    spec: RunSpec
    cluster: Cluster


def too_big(
    spec: RunSpec, cluster: Cluster, closest: Candidate, attempt: Attempt, in_host: tuple[int, int] | None
) -> PlanError:
    """The error for a run of which nothing fits; it names the first change, from small to large, that makes it fit.

    in_host: (layers, bytes) that host memory is too small for, where that is what is missing.
    """
    message = f"{spec.model} at {spec.bits} bits {shortage(closest)}{' of --max-memory' if spec.max_memory else ''}"
    if in_host:
        layers, held = in_host
        message += (
            f"; {layers} layers could wait in host memory, but they are {format_bytes(held)} and "
            f"{HEADROOM * 100:.0f} % of it {format_bytes(HEADROOM * cluster.memory_bytes)}"
        )
    for way in _ways(spec, cluster, in_host[1] if in_host else 0):
        try:
            found = attempt(way.spec, way.cluster)
        except QdistError:
            continue
        return PlanError(message, try_=f"{way.words} ({format_bytes(found.required_bytes)} a GPU, {_named(found)})")
    return PlanError(message, try_="a smaller model, or larger GPUs")


def _named(found: Candidate) -> str:
    away = f", {len(found.offloaded)} layers in host memory" if found.offloaded else ""
    return f"{found.layout.placement}{away}"


def _ways(spec: RunSpec, cluster: Cluster, in_host: int) -> Iterator[Way]:
    """Settings first, each alone and then all together; then host memory, then GPUs."""
    for words, changes in (*_eased(spec), *_placed(spec)):
        yield Way(words, msgspec.structs.replace(spec, **changes), cluster)
    together: dict[str, object] = {}
    words = ""
    for word, changes in (*_eased(spec), *_left_open(spec)):
        together |= changes
        words = _join(words, word)
        yield Way(words, msgspec.structs.replace(spec, **together), cluster)
    eased = msgspec.structs.replace(spec, **together)
    if in_host:
        gib = ceil(in_host / HEADROOM / GIB)
        words = f"{gib} GiB of host memory, which qdist plan --host-memory {gib}GiB assumes"
        yield Way(words, spec, msgspec.structs.replace(cluster, memory_bytes=gib * GIB))
    smallest = min(gpu.total_bytes for gpu in cluster.gpus)
    for gib in _LARGER_GIB if spec.max_memory else ():
        if gib * GIB <= smallest:
            yield Way(_join(f"--max-memory {gib}GiB", words), _capped(eased, gib), cluster)
    for count in _MORE_GPUS:
        if count > len(cluster.gpus):
            more = msgspec.structs.replace(cluster, gpus=tuple(cluster.gpus[:1]) * count)
            yield Way(_join(f"--gpus {count}", words), _with_gpus(eased, count), more)
    for gib in _LARGER_GIB:
        if gib * GIB > smallest and not spec.max_memory:
            yield Way(_join(f"GPUs of {gib} GiB", f"with {words}" if words else ""), eased, _larger(cluster, gib))


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _eased(spec: RunSpec) -> Iterator[Change]:
    """What the user fixed that takes memory, the cheapest to give up first."""
    if spec.micro_batch not in (None, 1):
        yield "--set micro_batch=1", {"micro_batch": 1}
    if spec.train.checkpointing is False:
        yield "--set train.checkpointing=true", {"train": msgspec.structs.replace(spec.train, checkpointing=True)}
    if spec.bits > 4:
        yield "--bits 4", {"bits": 4}


def _placed(spec: RunSpec) -> Iterator[Change]:
    """Another placement than the one that was named."""
    for other in ("shard", "split"):
        if spec.placement and (other != spec.placement or spec.gpus_per_group):
            words = f"--placement {other}" + (" --set gpus_per_group=auto" if spec.gpus_per_group else "")
            yield words, {"placement": other, "gpus_per_group": None, "split": Split()}


def _left_open(spec: RunSpec) -> Iterator[Change]:
    """The layout left to the planner."""
    if spec.placement or spec.gpus_per_group or spec.split != Split():
        keys = [f"{key}=auto" for key in ("placement", "gpus_per_group") if getattr(spec, key)]
        keys += [f"split.{key}=auto" for key, value in msgspec.structs.asdict(spec.split).items() if value is not None]
        words = " ".join(f"--set {key}" for key in keys)
        yield words, {"placement": None, "gpus_per_group": None, "split": Split()}


def _with_gpus(spec: RunSpec, count: int) -> RunSpec:
    return msgspec.structs.replace(spec, gpus=count, gpus_per_group=None)


def _capped(spec: RunSpec, gib: int) -> RunSpec:
    return msgspec.structs.replace(spec, max_memory=f"{gib}GiB")


def _larger(cluster: Cluster, gib: int) -> Cluster:
    gpus = tuple(msgspec.structs.replace(gpu, total_bytes=gib * GIB, free_bytes=gib * GIB) for gpu in cluster.gpus)
    return msgspec.structs.replace(cluster, gpus=gpus)
