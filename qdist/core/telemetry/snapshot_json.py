"""A snapshot of a run as JSON: what `qdist monitor --json` prints for scripts."""

import math
from typing import Any

from qdist.core.telemetry.snapshot import Row, Snapshot, mfu, rows
from qdist.core.telemetry.warnings import warnings


def as_json(snapshot: Snapshot) -> dict[str, Any]:
    """Plain values with units in their names; None for what nobody has said or what is no number."""
    fold, plan = snapshot.fold, snapshot.plan
    mean = fold.mean_tokens_per_s
    saved = fold.checkpoints[-1] if fold.checkpoints else None
    found = {
        "run": snapshot.name,
        "state": snapshot.state,
        "message": snapshot.message,
        "try": snapshot.try_,
        "time": snapshot.now,
        "model": plan.spec.model,
        "method": plan.spec.method,
        "bits": plan.spec.bits,
        "step": fold.step,
        "total_steps": fold.total_steps or plan.steps,
        "loss": fold.loss,
        "smoothed_loss": fold.smoothed_loss,
        "held_out": [{"step": step, "loss": _number(loss)} for step, loss in fold.held_out],
        "learning_rate": fold.learning_rate,
        "gradient_norm": fold.gradient_norm,
        "skipped_updates": len(fold.skipped),
        "tokens_per_s": fold.tokens_per_s,
        "mean_tokens_per_s": mean,
        "predicted_tokens_per_s": plan.tokens_per_second or None,
        "mfu": mfu(snapshot, fold.tokens_per_s),
        "mean_mfu": mfu(snapshot, mean),
        "padding_share": fold.padding_share,
        "data_share": fold.data_share,
        "slowest_rank": fold.skew[0] if fold.skew else None,
        "skew_share": fold.skew[1] if fold.skew else None,
        "seconds_left": fold.seconds_left,
        "checkpoint_step": saved[0] if saved else None,
        "checkpoint_time": saved[1] if saved else None,
        "ranks": [_row(row) for row in rows(snapshot)],
        "warnings": warnings(snapshot),
    }
    return {key: _number(value) for key, value in found.items()}


def _row(row: Row) -> dict[str, Any]:
    found = row._asdict()
    found["card"] = None if row.card is None else row.card._asdict()
    return {key: _number(value) for key, value in found.items()}


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
