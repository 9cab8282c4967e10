"""What does a run that does not fit lack, and what is the nearest that fits?"""

from collections.abc import Callable, Iterator
from math import ceil
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from qdist.core.candidates import HEADROOM, Candidate
from qdist.core.cluster import Cluster
from qdist.core.errors import PlanError, QdistError
from qdist.core.mistakes import typed
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
        yield Way(words, replace(spec, **changes), cluster)
    eased, words = spec, ""
    for ease in (_eased, _left_open):
        for word, changes in ease(eased):
            eased, words = replace(eased, **changes), _join(words, word)
            yield Way(words, eased, cluster)
    if in_host:
        gib = ceil(in_host / HEADROOM / GIB)
        host = f"{gib} GiB of host memory, which qdist plan --host-memory {gib}GiB assumes"
        yield Way(host, spec, replace(cluster, memory_bytes=gib * GIB))
    smallest = min(gpu.total_bytes for gpu in cluster.gpus)
    for gib in _LARGER_GIB if spec.max_memory else ():
        if gib * GIB <= smallest:
            yield Way(_join(f"--max-memory {gib}GiB", words), _capped(eased, gib), cluster)
    for count in _MORE_GPUS:
        if count > len(cluster.gpus):
            more = replace(cluster, gpus=tuple(cluster.gpus[:1]) * count)
            yield Way(_join(f"--gpus {count}", words), _with_gpus(eased, count), more)
    for gib in _LARGER_GIB:
        if gib * GIB > smallest and not spec.max_memory:
            yield Way(_join(f"GPUs of {gib} GiB", f"with {words}" if words else ""), eased, _larger(cluster, gib))


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _eased(spec: RunSpec) -> Iterator[Change]:
    """What the user fixed that takes memory, the cheapest to give up first."""
    if spec.micro_batch not in (None, 1):
        yield typed("micro_batch", 1), {"micro_batch": 1}
    if spec.train.checkpointing is False:
        yield typed("train.checkpointing", "true"), {"train": replace(spec.train, checkpointing=True)}
    if spec.zero.stage is not None:
        yield typed("zero.stage", "auto"), {"zero": replace(spec.zero, stage=None)}
    if spec.bits > 4:
        yield typed("bits", 4), {"bits": 4}


def _placed(spec: RunSpec) -> Iterator[Change]:
    """Groups of another size, then another placement than the one that was named."""
    if not spec.placement:
        return
    size_words, size_change = _opened(spec, "gpus_per_group")
    if spec.gpus_per_group:
        words, changes = _stages_of(spec) if spec.placement == "split" else ("", {})
        yield _join(size_words, words), size_change | changes
    for other in ("shard", "split"):
        if other == spec.placement:
            continue
        split_words, split_change = _opened(spec, "split")
        words, changes = _stages_of(spec) if other == "split" else ("", {})
        yield (
            _join(typed("placement", other), size_words, split_words, words),
            {"placement": other} | size_change | split_change | changes,
        )


def _left_open(spec: RunSpec) -> Iterator[Change]:
    """The layout left to the planner."""
    opened = [_opened(spec, key) for key in ("placement", "gpus_per_group", "split")]
    changes: dict[str, Any] = {key: value for _, own in opened for key, value in own.items()}
    if not changes:
        return
    words = _join(*(own for own, _ in opened))
    if spec.train.verify_steps and "placement" in changes:
        words = _join(words, typed("train.verify_steps", 0))
        changes["train"] = replace(spec.train, verify_steps=0)
    yield words, changes


def _opened(spec: RunSpec, key: str) -> Change:
    """A setting, or the section `split`, left to the planner; nothing where it was."""
    if key != "split":
        return (typed(key, "auto"), {key: None}) if getattr(spec, key) else ("", {})
    fixed = [name for name, value in msgspec.structs.asdict(spec.split).items() if value is not None]
    return _join(*(typed(f"split.{name}", "auto") for name in fixed)), {"split": Split()} if fixed else {}


def _stages_of(spec: RunSpec) -> Change:
    """What a split cannot have."""
    words, changes = "", dict[str, Any]()
    if spec.train.verify_steps:
        words, changes = typed("train.verify_steps", 0), {"train": replace(spec.train, verify_steps=0)}
    if spec.zero.stage:
        words = _join(words, typed("zero.stage", "auto"))
        changes["zero"] = replace(spec.zero, stage=None)
    return words, changes


def _with_gpus(spec: RunSpec, count: int) -> RunSpec:
    return replace(spec, gpus=count, gpus_per_group=None)


def _capped(spec: RunSpec, gib: int) -> RunSpec:
    return replace(spec, max_memory=f"{gib}GiB")


def _larger(cluster: Cluster, gib: int) -> Cluster:
    gpus = tuple(replace(gpu, total_bytes=gib * GIB, free_bytes=gib * GIB) for gpu in cluster.gpus)
    return replace(cluster, gpus=gpus)
