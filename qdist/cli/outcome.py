"""What a finished run was predicted to take and what it took, as rows for a person."""

from typing import Any, NamedTuple

from qdist.cli.views import loading
from qdist.core.plan import Plan
from qdist.core.prediction import shown_error
from qdist.core.units import format_bytes, format_count, format_duration

Row = tuple[str, str, str, str]
"""What, predicted, measured, error."""

_ALIKE = 0.02


class _Memory(NamedTuple):
    label: str
    predicted: int
    measured: int


def outcome_rows(plan: Plan, result: dict[str, Any]) -> list[Row]:
    """Peak memory of each GPU, or of the fullest where all are alike; on GPUs, of loading too, and tokens/s.

    result: what `result.json` holds. Errors are as `prediction.MEANING` says.
    """
    found = _memories(plan, result)
    shown = found
    if len(found) > 2 and _alike(found):
        fullest = max(found, key=lambda memory: memory.measured)
        shown = [fullest._replace(label=f"memory of the fullest of {len(found)} {_kind(plan)}s")]
    rows = [_row(memory.label, memory.predicted, memory.measured, format_bytes) for memory in shown]
    if plan.device == "cpu":
        return rows
    load = max((peak.get("load", 0) for of_rank in result["peaks"] for peak in of_rank), default=0)
    if load:
        rows.append(_row("memory while loading", plan.load_peak_bytes, load, format_bytes))
    if speed := result["tokens_per_s"]["measured"]:
        rows.append(_row("tokens/s", plan.tokens_per_second, speed, format_count))
    return rows


def start_line(result: dict[str, Any]) -> str:
    """'first step after 42 s; loading 31 s, 33.5 GiB read at 1.2 GB/s', or nothing where nobody said."""
    first = result["start_seconds"]["first_step"]
    if first is None:
        return ""
    own = result.get("loading", {"seconds": 0.0, "read_bytes": 0})
    return f"first step after {format_duration(first)}; loading {loading(own['seconds'], own['read_bytes'])}"


def _memories(plan: Plan, result: dict[str, Any]) -> list[_Memory]:
    return [
        _Memory(
            f"memory of {_kind(plan)} {rank.gpus[position] if rank.gpus else rank.rank}",
            expected.total,
            peak["allocated"] + peak["context"],
        )
        for rank, peaks in zip(plan.ranks, result["peaks"], strict=True)
        for position, (expected, peak) in enumerate(zip(rank.expected, peaks, strict=True))
    ]


def _kind(plan: Plan) -> str:
    return "GPU" if plan.device == "cuda" else "rank"


def _alike(found: list[_Memory]) -> bool:
    return all(
        max(values) - min(values) <= _ALIKE * max(values)
        for values in ([memory.predicted for memory in found], [memory.measured for memory in found])
    )


def _row(label: str, predicted: float, measured: float, shown: Any) -> Row:
    if not predicted:
        return label, "-", shown(measured), ""
    return label, shown(predicted), shown(measured), shown_error(predicted, measured)
