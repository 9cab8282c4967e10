"""What two runs did differently, and what came of it."""

from collections.abc import Callable

from qdist.core.report import Report
from qdist.core.report_sections import Table, number, took
from qdist.core.units import format_bytes, format_count, format_duration, signed

_METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("Loss, mean of the last steps, 20 at most", number),
    "held_out_loss": ("Held-out loss, last", number),
    "best_held_out_loss": ("Held-out loss, best", number),
    "steps": ("Steps", lambda value: f"{value:,.0f}"),
    "tokens": ("Tokens", lambda value: f"{value:,.0f}"),
    "tokens_per_s": ("Tokens/s", format_count),
    "step_s": ("Time of a step", took),
    "padding_share": ("Padding", lambda value: f"{100 * value:.1f} %"),
    "peak_bytes": ("Peak memory, fullest", format_bytes),
    "duration_s": ("Duration", format_duration),
    "gpu_hours": ("Hours of all GPUs or ranks", lambda value: f"{value:.3g}"),
}


def metrics_beside(a: Report, b: Report) -> Table:
    """What both or one of them measured, and by how much B differs from A."""
    rows = []
    for key, (label, as_text) in _METRICS.items():
        first, second = a.metrics.get(key), b.metrics.get(key)
        if first is None and second is None:
            continue
        difference = signed(second / first - 1) if first and second is not None else ""
        rows.append((label, *("-" if value is None else as_text(value) for value in (first, second)), difference))
    return Table(headers=("", a.name, b.name, "B against A"), rows=tuple(rows))


def differences(a: Report, b: Report) -> Table:
    """Settings, decisions and versions that are not the same."""
    mine, other = a.choices | dict(a.versions), b.choices | dict(b.versions)
    keys = [*mine, *(key for key in other if key not in mine)]
    rows = tuple(
        (key, mine.get(key, "-"), other.get(key, "-")) for key in keys if mine.get(key, "-") != other.get(key, "-")
    )
    return Table(headers=("", a.name, b.name), rows=rows)
