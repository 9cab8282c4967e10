"""Keeps what finished runs teach the planner: one JSON line a run, beside the other caches of this machine."""

import os
from pathlib import Path

import msgspec

from qdist.core.errors import RunError
from qdist.core.machine.calibration import CalibrationSample, Correction, correction
from qdist.core.machine.cluster import Cluster
from qdist.core.planning.plan import Plan
from qdist.host.files import cache_dir, cache_path, locked, write_atomic
from qdist.host.machine import probe
from qdist.host.opening import converted, decoded, read_bytes
from qdist.host.run.rundir import RunDir

FILE, LOCK = "lessons.jsonl", ".lessons.lock"
_KEPT, _SPARE = 500, 100
"""The file is cut back to the newest once it holds that many more."""


def correction_for(
    cluster: Cluster, *, world_size: int | None = None, bits: int | None = None, placement: str | None = None
) -> Correction | None:
    """What runs on this machine's kind of card have taught, for the planner; None on a CPU and before the first run.

    world_size: of the run to be planned; by default all GPUs.
    bits, placement: learn speed from such runs alone.
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
    )


def learn(run: RunDir, *, cluster: Cluster | None = None) -> CalibrationSample | None:
    """Keep the lesson of a finished run; None where there is none: on CPU ranks, or before the run has finished.

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
    """What a run on these GPUs teaches. result: what `result.json` holds."""
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
    return CalibrationSample(
        card=cluster.gpus[index if index < len(cluster.gpus) else 0].name,
        gpus=len(cluster.gpus),
        world_size=plan.world_size,
        placement=plan.placement,
        gpus_per_group=plan.gpus_per_group,
        zero_stage=plan.zero_stage,
        model=plan.spec.model or "",
        bits=plan.spec.bits,
        seq_len=plan.seq_len,
        micro_batch=plan.micro_batch,
        checkpointed_layers=plan.checkpointed_layers,
        predicted_bytes=expected.total,
        measured_bytes=total,
        predicted_context_bytes=expected.context,
        measured_context_bytes=_context(peak.context, expected.context, expected.pageable),
        predicted_tokens_s=plan.tokens_per_second
        / (plan.correction.speed_of(plan.placement) if plan.correction else 1),
        measured_tokens_s=measured.tokens_per_s.measured or 0.0,
        rates=_rates(cluster),
        version=_version(),
    )


class _Speed(msgspec.Struct):
    measured: float | None


class _Peak(msgspec.Struct):
    allocated: int
    context: int


class _Result(msgspec.Struct):
    """What a lesson needs of `result.json`."""

    peaks: list[list[_Peak]]
    tokens_per_s: _Speed


def _context(measured: int, predicted: int, pageable: int) -> int | None:
    """Without the paged moments, which torch does not count either; None where they seem to lie in host memory."""
    left = measured - pageable
    return left if not pageable or left >= predicted // 2 else None


def _rates(cluster: Cluster) -> str:
    """'measured' or 'table': ratios to predictions from one say nothing of predictions from the other."""
    words = cluster.rates.source.split() if cluster.rates else []
    return words[0].rstrip(":") if words else ""


def _version() -> str:
    return probe.versions().get("qdist", "")


def read() -> tuple[CalibrationSample, ...]:
    """All lessons, oldest first. A line that is not a lesson of this version, or was torn by a kill, is passed over."""
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
    """Add a lesson, on disk when this returns; the oldest beyond the last 500 go in time."""
    folder = cache_dir()
    path = folder / FILE
    with locked(folder / LOCK):
        _append_line(path, msgspec.json.encode(lesson))
        lines = path.read_bytes().splitlines(keepends=True)
        if len(lines) > _KEPT + _SPARE:
            write_atomic(path, b"".join(lines[-_KEPT:]))


def _append_line(path: Path, line: bytes) -> None:
    """In one write, on a line of its own even where a kill left half a line."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (b"\n" if torn else b"") + line + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
