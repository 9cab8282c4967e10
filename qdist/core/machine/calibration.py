"""What finished runs teach the planner: how far its predictions were off on a card, and what to correct."""

from collections.abc import Sequence
from statistics import median

import msgspec

from qdist.core.text import GIB

_NEWEST = 10
"""Newest samples used for a correction: a new driver or a moved card shows after a few runs."""
_LEAST_SPEED, _MOST_SPEED = 0.5, 2.0
_STRANGE_CONTEXT_BYTES = 2 * GIB
"""Bytes over the predicted context beyond which it must include another process's memory."""


class CalibrationSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One finished run on GPUs. Memory is that of the fullest GPU."""

    card: str
    gpus: int
    """GPUs in the machine, used or not."""
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
    """Bytes of CUDA context, libraries and NCCL; None if paged optimizer state hides them. Predicted or measured, they
    are without those planned for CUDA graphs, which depend on the model."""
    predicted_tokens_s: float
    """Predicted tokens/s before any correction, so that corrections do not compound; 0 if unknown."""
    measured_tokens_s: float
    rates: str = ""
    """Kind of rates behind the prediction: the first word of `Rates.source`."""
    useful_share: float = 0.0
    """Expected share of the computed positions that hold tokens; 0 for samples of an older qdist, whose prediction
    counted padding as tokens."""
    version: str = ""
    """Version of qdist."""
    compute: str | None = None
    """`spec.compute`: fp8, or None for products in 16 bits."""


class Correction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Correction of a prediction. Kept in the plan, so that the uncorrected prediction can be recovered."""

    speed: float = 1.0
    """Measured over predicted tokens/s, for a placement without a ratio of its own."""
    speeds: tuple[tuple[str, float], ...] = ()
    """(placement, ratio) of each placement that has run here."""
    context_bytes: int | None = None
    """Measured bytes of CUDA context and NCCL on one GPU; None if not measured."""
    runs: int = 0
    """Runs that it was learnt from; 0 if not counted."""

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
    compute: str | None = None,
) -> Correction | None:
    """What the newest lessons say of a card; None when they say nothing.

    lessons: oldest first.
    world_size: of the run to come; what NCCL takes depends on it, how fast a card computes does not.
    placement, bits, rates, version: only lessons of these count for speed; None takes any.
    compute: the arithmetic of the run to come; None for products in 16 bits. Only such lessons count for speed.
    """
    alike = [lesson for lesson in lessons if lesson.card == card]
    timed = [
        lesson
        for lesson in alike
        if lesson.predicted_tokens_s > 0 and lesson.measured_tokens_s > 0 and lesson.useful_share > 0
        if placement in (None, lesson.placement) and bits in (None, lesson.bits)
        if rates in (None, lesson.rates) and version in (None, lesson.version) and lesson.compute == compute
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
