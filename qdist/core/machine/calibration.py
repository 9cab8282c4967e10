"""What finished runs teach the planner: how far its predictions were off on a card, and what to correct."""

from collections.abc import Sequence
from statistics import median

import msgspec

from qdist.core.text import GIB

_NEWEST = 10
"""Lessons that a correction is taken from: a new driver or a moved card is believed after a few runs."""
_LEAST_SPEED, _MOST_SPEED = 0.5, 2.0
_STRANGE_CONTEXT_BYTES = 2 * GIB
"""A context that exceeds its prediction by more than this holds another process's memory."""


class CalibrationSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One finished run on GPUs. Memory is of the GPU that came fullest."""

    card: str
    gpus: int
    """Of the machine, used or not."""
    world_size: int
    placement: str
    gpus_per_group: int
    zero_stage: int
    model: str
    bits: int
    seq_len: int
    micro_batch: int
    checkpointed_layers: int
    predicted_bytes: int
    measured_bytes: int
    predicted_context_bytes: int
    measured_context_bytes: int | None
    """CUDA context, libraries and NCCL; None where paged optimizer state hides it."""
    predicted_tokens_s: float
    """As the formulas gave it, before any correction, so that corrections do not compound; 0 where unknown."""
    measured_tokens_s: float
    rates: str = ""
    """What kind of rates the prediction came from: the first word of `Rates.source`."""
    version: str = ""
    """qdist's."""


class Correction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to change in a prediction. Kept in the plan, so that what was predicted without it can be told."""

    speed: float = 1.0
    """Measured tokens/s over predicted, where the placement has no ratio of its own."""
    speeds: tuple[tuple[str, float], ...] = ()
    """(placement, ratio) of each placement that has run here."""
    context_bytes: int | None = None
    """Measured CUDA context and NCCL on one GPU; None where nothing was learnt of it."""
    runs: int = 0
    """That taught it; 0 where nobody counted."""

    def speed_of(self, placement: str) -> float:
        """The ratio for one placement."""
        return dict(self.speeds).get(placement, self.speed)


def correction(
    lessons: Sequence[CalibrationSample],
    *,
    card: str,
    world_size: int,
    placement: str | None = None,
    bits: int | None = None,
    rates: str | None = None,
    version: str | None = None,
) -> Correction | None:
    """What the newest lessons say of a card; None when they say nothing.

    lessons: oldest first.
    world_size: of the run to come; what NCCL takes depends on it, how fast a card computes does not.
    placement, bits, rates, version: only lessons of these count for speed; None takes any.
    """
    alike = [lesson for lesson in lessons if lesson.card == card]
    timed = [
        lesson
        for lesson in alike
        if lesson.predicted_tokens_s > 0 and lesson.measured_tokens_s > 0
        if placement in (None, lesson.placement) and bits in (None, lesson.bits)
        if rates in (None, lesson.rates) and version in (None, lesson.version)
    ]
    contexts = [
        lesson.measured_context_bytes
        for lesson in alike
        if lesson.world_size == world_size and lesson.measured_context_bytes is not None
        if lesson.measured_context_bytes <= lesson.predicted_context_bytes + _STRANGE_CONTEXT_BYTES
    ][-_NEWEST:]
    if not timed and not contexts:
        return None
    placements = sorted({lesson.placement for lesson in timed})
    return Correction(
        speed=_ratio(timed) if timed else 1.0,
        speeds=tuple((name, _ratio([lesson for lesson in timed if lesson.placement == name])) for name in placements),
        context_bytes=int(median(contexts)) if contexts else None,
        runs=max(len(timed[-_NEWEST:]), len(contexts)),
    )


def _ratio(timed: Sequence[CalibrationSample]) -> float:
    """Measured over predicted speed, kept from running away: a throttled card is no reason to expect nothing of it."""
    middle = median(lesson.measured_tokens_s / lesson.predicted_tokens_s for lesson in timed[-_NEWEST:])
    return min(_MOST_SPEED, max(_LEAST_SPEED, middle))
