"""Which layers lie on which GPU of a split backbone?"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from qdist.core.errors import PlanError
from qdist.core.text import format_bytes

_HALVINGS = 40
"""Bisection steps in the search for the fill of the fullest GPU: exact to a byte on any GPU."""


def place_layers(layer_bytes: Sequence[int], budget_bytes: Sequence[int]) -> tuple[int, ...]:
    """Assign each decoder layer to a GPU so that the fullest GPU, for its size, is as empty as it can be.

    layer_bytes: packed weights, adapter state and activations of each layer.
    budget_bytes: what each GPU may hold of them.
    Returns positions, never decreasing; a GPU without room for a layer gets none.

    Raises PlanError, naming the missing bytes and the GPU, when no assignment fits.
    """
    layer_map = spread_layers(layer_bytes, budget_bytes)
    held = [0] * len(budget_bytes)
    for size, gpu in zip(layer_bytes, layer_map, strict=True):
        held[gpu] += size
    missing = [need - room for need, room in zip(held, budget_bytes, strict=True)]
    if max(missing) > 0:
        worst = missing.index(max(missing))
        raise PlanError(
            f"{len(layer_bytes)} layers of {format_bytes(sum(layer_bytes))} in all do not fit {len(budget_bytes)} GPUs "
            f"with room for {format_bytes(sum(max(0, room) for room in budget_bytes))}: {format_bytes(missing[worst])} "
            f"are missing on GPU {worst}",
            try_="more GPUs, or split.offload_layers",
        )
    return layer_map


def spread_layers(layer_bytes: Sequence[int], budget_bytes: Sequence[int]) -> tuple[int, ...]:
    """Like `place_layers`, but if nothing fits, every GPU overflows by the same share."""
    rooms = [max(1, room) for room in budget_bytes]
    before = list(accumulate(layer_bytes, initial=0))
    low, high = 0.0, before[-1] / min(rooms) + 1
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _ends(before, rooms, middle)[-1] == len(layer_bytes) else (middle, high)
    ends = _ends(before, rooms, high)
    return map_of([end - start for start, end in pairwise([0, *ends])])


def _ends(before: Sequence[int], rooms: Sequence[int], fill: float) -> list[int]:
    """The layer after the last of each GPU, when GPU after GPU is filled up to `fill` of its room.

    before: bytes of all layers before each, and of all.
    """
    ends: list[int] = []
    start = 0
    for room in rooms:
        start = max(start, bisect_right(before, before[start] + fill * room) - 1)
        ends.append(start)
    return ends


def balance(layers: int, most: Sequence[int], extra: Sequence[float]) -> tuple[int, ...] | None:
    """Layers of each stage so that the slowest stage is as fast as it can be; None when they do not fit.

    most: layers that each stage has memory for.
    extra: what each stage computes beside layers, in layers: the head and the loss on the last.
    Of stages that end alike, a later one gets the layer: it keeps fewer micro-batches.
    """
    if sum(most) < layers or min(most) < 1 or layers < len(most):
        return None
    counts = [1] * len(most)
    for _ in range(layers - len(most)):
        open_ = [stage for stage in range(len(most)) if counts[stage] < most[stage]]
        counts[min(open_, key=lambda stage: (counts[stage] + extra[stage], -stage))] += 1
    return tuple(counts)


def pace(
    layer_times: Sequence[float], extra: Sequence[float], holds: Callable[[int, int, int], bool]
) -> tuple[int, ...] | None:
    """As `balance`, for layers that take different times; None when they do not fit.

    extra: what each stage takes beside layers. holds: whether a stage has memory for so many layers from one on.
    Of ways that are as fast, the one in which later stages have most: these keep fewer micro-batches.
    """
    before = list(accumulate(layer_times, initial=0.0))
    fastest = None
    low, high = 0.0, 2 * (before[-1] + max(extra))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        counts = _paced(before, extra, holds, middle)
        fastest = counts or fastest
        low, high = (low, middle) if counts else (middle, high)
    return fastest


def _paced(
    before: Sequence[float], extra: Sequence[float], holds: Callable[[int, int, int], bool], slowest: float
) -> tuple[int, ...] | None:
    """Layers of each stage if each, from the last on, takes all it can within a time; None if some are left over."""
    counts: list[int] = []
    end = len(before) - 1
    for stage in reversed(range(len(extra))):
        start = bisect_left(before, before[end] - (slowest - extra[stage]))
        number = end - max(start, stage)  # each earlier stage needs one
        while number > 0 and not holds(stage, end - number, number):
            number -= 1
        if number < 1:
            return None
        counts.append(number)
        end -= number
    return None if end else tuple(reversed(counts))


def map_of(counts: Sequence[int]) -> tuple[int, ...]:
    """(2, 1) -> (0, 0, 1)."""
    return tuple(position for position, count in enumerate(counts) for _ in range(count))


def scattered(layers: int, chosen: int) -> tuple[int, ...]:
    """`chosen` layers with even gaps between them, so that each is copied while the others compute."""
    return tuple(int((index + 0.5) * layers / chosen) for index in range(chosen))


def least(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The least count that fits, or `high` if none does: needs fall as the count rises."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high
