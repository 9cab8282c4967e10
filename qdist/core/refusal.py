"""What does a run that does not fit lack, and what is the nearest that fits?"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from qdist.core.candidates import Candidate
from qdist.core.cluster import Cluster
from qdist.core.errors import PlanError, QdistError
from qdist.core.ranking import shortage
from qdist.core.spec import RunSpec, Split
from qdist.core.units import GIB, format_bytes

_MORE_GPUS = (2, 4, 8, 16)
_LARGER_GIB = (8, 11, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)

Attempt = Callable[[RunSpec, Cluster], Candidate]
"""The best candidate for a spec on a machine; raises QdistError when there is none."""


class Way(NamedTuple):
    """A change to what was asked, in the words in which one asks."""

    words: str
    spec: RunSpec
    cluster: Cluster


def too_big(spec: RunSpec, cluster: Cluster, closest: Candidate, attempt: Attempt) -> PlanError:
    """The error for a run of which nothing fits; it names the first change, from small to large, that makes it fit."""
    message = f"{spec.model} at {spec.bits} bits {shortage(closest)}{' of --max-memory' if spec.max_memory else ''}"
    for way in _ways(spec, cluster):
        try:
            found = attempt(way.spec, way.cluster)
        except QdistError:
            continue
        return PlanError(message, try_=f"{way.words} ({format_bytes(found.required_bytes)} a GPU, {_named(found)})")
    return PlanError(message, try_="a smaller model, or larger GPUs")


def _named(found: Candidate) -> str:
    away = f", {len(found.offloaded)} layers in host memory" if found.offloaded else ""
    return f"{found.layout.placement}{away}"


def _ways(spec: RunSpec, cluster: Cluster) -> Iterator[Way]:
    """Settings first, each alone and then all together; then GPUs."""
    free = list(_freed(spec))
    for words, changes in free:
        yield Way(words, msgspec.structs.replace(spec, **changes), cluster)
    together: dict[str, object] = {}
    words = ""
    for word, changes in free:
        together |= changes
        words = f"{words} {word}".strip()
        yield Way(words, msgspec.structs.replace(spec, **together), cluster)
    eased = msgspec.structs.replace(spec, **together)
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


def _freed(spec: RunSpec) -> Iterator[tuple[str, dict[str, object]]]:
    """What the user fixed and could give up, the cheapest first."""
    if spec.micro_batch not in (None, 1):
        yield "--set micro_batch=1", {"micro_batch": 1}
    if spec.train.checkpointing is False:
        yield "--set train.checkpointing=true", {"train": msgspec.structs.replace(spec.train, checkpointing=True)}
    if spec.placement == "replicate" or (spec.placement and spec.gpus_per_group):
        yield "--placement shard", {"placement": "shard", "gpus_per_group": None, "split": Split()}
    if spec.placement == "shard":
        yield "--placement split", {"placement": "split", "gpus_per_group": None}
    if spec.split.schedule == "1f1b":
        yield "--set split.schedule=sequential", {"split": msgspec.structs.replace(spec.split, schedule="sequential")}
    if spec.bits > 4:
        yield "--bits 4", {"bits": 4}


def _with_gpus(spec: RunSpec, count: int) -> RunSpec:
    return msgspec.structs.replace(spec, gpus=count, gpus_per_group=None)


def _capped(spec: RunSpec, gib: int) -> RunSpec:
    return msgspec.structs.replace(spec, max_memory=f"{gib}GiB")


def _larger(cluster: Cluster, gib: int) -> Cluster:
    gpus = tuple(msgspec.structs.replace(gpu, total_bytes=gib * GIB, free_bytes=gib * GIB) for gpu in cluster.gpus)
    return msgspec.structs.replace(cluster, gpus=gpus)
