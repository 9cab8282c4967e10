"""What of a running training needs a person now, in words."""

import math
from collections.abc import Iterator

from qdist.core.jumps import BEFORE, first_losses, jumped_from, risen_from
from qdist.core.snapshot import Snapshot, rows
from qdist.core.units import format_bytes

NEAR_LIMIT, APART, STALLED, PADDED = 0.97, 0.15, 0.05, 0.30
_WATCHED = 30
"""Last steps in which a jump is still told."""


def warnings(snapshot: Snapshot) -> list[str]:
    """A sentence each, the most urgent first; empty where all is well."""
    live = snapshot.state == "running"
    return [
        *(snapshot.troubles if live else ()),
        *_loss(snapshot),
        *(_memory(snapshot) if live else ()),
        *(_cards(snapshot) if live else ()),
        *_pace(snapshot),
        *([snapshot.fold.unread] if snapshot.fold.unread else ()),
    ]


def _loss(snapshot: Snapshot) -> Iterator[str]:
    columns = snapshot.fold.columns
    steps, losses = columns.step[-_WATCHED - BEFORE :], columns.loss[-_WATCHED - BEFORE :]
    if losses and not math.isfinite(losses[-1]):
        bad = len(losses) - 1
        while bad and not math.isfinite(losses[bad - 1]):
            bad -= 1
        since = "at" if bad == len(losses) - 1 else "since"
        # What to try in a run that has ended, its error says.
        advice = ": stop and try a smaller optim.lr" if snapshot.state == "running" else ""
        yield f"the loss is not a number {since} step {steps[bad]:,}{advice}"
    if (risen := risen_from(columns.loss)) is not None:
        yield f"the loss has risen from {risen[0]:.3f} to {risen[1]:.3f}: training does harm; try a smaller optim.lr"
    first = first_losses(columns.loss)
    for index in range(len(losses) - 1, BEFORE - 1, -1):
        mean = jumped_from(losses[index - BEFORE : index], losses[index], first)
        if mean is not None:
            yield f"the loss jumped from {mean:.3f} to {losses[index]:.3f} at step {steps[index]:,}"
            break
    recent = [step for step in snapshot.fold.skipped[-_WATCHED:] if steps and step >= steps[0]]
    if recent:
        yield f"{len(recent)} of the last {len(steps)} updates were skipped: their gradients were NaN or infinite"


def _memory(snapshot: Snapshot) -> Iterator[str]:
    for row in rows(snapshot):
        held = max(row.now_bytes or 0, row.peak_bytes or 0)
        if row.limit_bytes and held >= NEAR_LIMIT * row.limit_bytes:
            yield (
                f"{row.label} is at {format_bytes(held)} of {format_bytes(row.limit_bytes)} "
                f"({held / row.limit_bytes:.0%}): it may run out; a smaller micro_batch needs less"
            )


def _cards(snapshot: Snapshot) -> Iterator[str]:
    for row in rows(snapshot):
        if row.card and row.card.throttled:
            heat = "" if row.card.temperature_c is None else f" ({row.card.temperature_c} C)"
            yield f"GPU {row.gpu} of rank {row.rank} throttles: {row.card.throttled}{heat}"


def _pace(snapshot: Snapshot) -> Iterator[str]:
    fold = snapshot.fold
    if fold.skew and fold.skew[1] > APART:
        rank, share = fold.skew
        yield f"ranks drift apart: rank {rank}'s passes take {share:.0%} longer than the fastest's, which wait"
    if (stalled := fold.data_share or 0.0) > STALLED:
        yield f"data stalls: making samples took {stalled:.0%} of the last steps' time"
    if (padding := fold.padding_share or 0.0) > PADDED:
        yield f"{padding:.0%} of the computed positions are padding: a smaller micro_batch wastes less"
