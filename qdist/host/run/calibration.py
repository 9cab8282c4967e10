"""Stores what finished runs teach the planner: one JSON line per run, next to this machine's other caches."""

import os
from pathlib import Path

import msgspec

from qdist.core.errors import RunError
from qdist.core.machine.calibration import CalibrationSample, Correction, correction
from qdist.core.machine.cluster import Cluster
from qdist.core.planning.plan import Plan
from qdist.core.planning.process_memory import graph_bytes
from qdist.host.files import cache_dir, cache_path, locked, write_atomic
from qdist.host.machine import probe
from qdist.host.opening import converted, decoded, read_bytes
from qdist.host.run.rundir import RunDir

FILE, LOCK = "lessons.jsonl", ".lessons.lock"
_KEPT, _SPARE = 500, 100
"""Lines kept when the file is trimmed, and how many more trigger that."""


def correction_for(
    cluster: Cluster,
    *,
    world_size: int | None = None,
    bits: int | None = None,
    placement: str | None = None,
    compute: str | None = None,
) -> Correction | None:
    """The planner's correction from earlier runs on this kind of card; None on a CPU and before the first run.

    world_size: of the run to be planned; by default all GPUs.
    bits, placement, compute: learn speed from such runs alone.
    """
    if not cluster.gpus:
        return None
    return correction(
        read(),
        card=cluster.gpus[0].name,
        world_size=world_size or len(cluster.gpus),
        placement=placement,
        bits=bits,
        rates=_rates(cluster),
        version=_version(),
        compute=compute,
    )


def learn(run: RunDir, *, cluster: Cluster | None = None) -> CalibrationSample | None:
    """Store the lesson of a finished run; None if there is none: on CPU ranks, or for an unfinished run.

    cluster: of the machine that the run was on; by default the one that it was planned for.
    """
    plan = run.plan()
    result = run.result_of(plan)
    if result is None or plan.device == "cpu" or "peaks" not in result:
        return None
    found = lesson_of(plan, result, cluster or run.machine() or probe.cluster())
    if found is not None:
        append(found)
    return found


def lesson_of(plan: Plan, result: dict[str, object], cluster: Cluster) -> CalibrationSample | None:
    """What a run on these GPUs teaches. result: the contents of `result.json`."""
    measured = converted(result, _Result, "result.json", RunError)
    peaks = [
        (peak.allocated + peak.context, peak, expected)
        for rank, of_rank in zip(plan.ranks, measured.peaks, strict=True)
        for peak, expected in zip(of_rank, rank.expected, strict=True)
    ]
    if not peaks or not cluster.gpus:
        return None
    total, peak, expected = max(peaks, key=lambda each: each[0])
    index = plan.ranks[0].gpus[0]
    graphs = plan.graphs * graph_bytes(plan.facts.layer_count)
    return CalibrationSample(
        card=cluster.gpus[index if index < len(cluster.gpus) else 0].name,
        gpus=len(cluster.gpus),
        world_size=plan.world_size,
        placement=plan.placement,
        gpus_per_group=plan.gpus_per_group,
        zero_stage=plan.zero_stage,
        model=plan.spec.model or "",
        bits=plan.spec.bits,
        compute=plan.spec.compute,
        seq_len=plan.seq_len,
        micro_batch=plan.micro_batch,
        checkpointed_layers=plan.checkpointed_layers,
        predicted_bytes=expected.total,
        measured_bytes=total,
        predicted_context_bytes=expected.context - graphs,
        measured_context_bytes=_context(peak.context - graphs, expected.context - graphs, expected.pageable),
        predicted_tokens_s=plan.tokens_per_second
        / (plan.correction.speed_of(plan.placement) if plan.correction else 1),
        measured_tokens_s=measured.tokens_per_s.measured or 0.0,
        rates=_rates(cluster),
        useful_share=plan.useful_share if plan.fill or plan.data is None else 0.0,
        version=_version(),
    )


class _Speed(msgspec.Struct):
    measured: float | None


class _Peak(msgspec.Struct):
    allocated: int
    context: int


class _Result(msgspec.Struct):
    """The fields of `result.json` that a lesson needs."""

    peaks: list[list[_Peak]]
    tokens_per_s: _Speed


def _context(measured: int, predicted: int, pageable: int) -> int | None:
    """Context bytes without paged moments, which torch does not count; None if those seem to be in host memory."""
    left = measured - pageable
    return left if not pageable or left >= predicted // 2 else None


def _rates(cluster: Cluster) -> str:
    """'measured' or 'table': ratios to one kind of prediction do not apply to the other."""
    words = cluster.rates.source.split() if cluster.rates else []
    return words[0].rstrip(":") if words else ""


def _version() -> str:
    return probe.versions().get("qdist", "")


def read() -> tuple[CalibrationSample, ...]:
    """All lessons, oldest first. Skips lines of other versions and lines torn by a kill."""
    try:
        lines = read_bytes(cache_path() / FILE, RunError).splitlines()
    except RunError:
        return ()
    return tuple(lesson for line in lines if (lesson := _decode(line)) is not None)


def _decode(line: bytes) -> CalibrationSample | None:
    try:
        return decoded(line, CalibrationSample, FILE, RunError)
    except RunError:
        return None


def append(lesson: CalibrationSample) -> None:
    """Add a lesson and flush it to disk; lessons older than the last 500 are eventually dropped."""
    folder = cache_dir()
    path = folder / FILE
    with locked(folder / LOCK):
        _append_line(path, msgspec.json.encode(lesson))
        lines = path.read_bytes().splitlines(keepends=True)
        if len(lines) > _KEPT + _SPARE:
            write_atomic(path, b"".join(lines[-_KEPT:]))


def _append_line(path: Path, line: bytes) -> None:
    """Append in one write, on a new line even after a line torn by a kill."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (b"\n" if torn else b"") + line + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
