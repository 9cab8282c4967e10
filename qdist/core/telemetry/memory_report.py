"""A run's memory by part, predicted of each GPU and measured, and how far off a prediction was."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from qdist.core.planning.memory import MemoryBudget
from qdist.core.planning.plan import Plan
from qdist.core.telemetry.history import RunHistory
from qdist.core.text import signed

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "gathers", "context")
WORKING = "activations, logits and gathers"
"""Parts measured together: torch's peak without what stays from step to step."""
REST = "everything else"
"""Resident set of a CPU rank without the tensors that stay."""
TOTAL = "total"
_HELD = ("weights", "adapter", "gradients", "optimizer")
_ALIKE = 0.02
_MOST_SHOWN = 4


class MemoryParts(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU, or one rank on CPUs. Bytes of each part, in the order of PARTS."""

    label: str
    predicted: dict[str, int]
    measured: dict[str, int]
    """Measured bytes of each part, merged where they cannot be told apart; empty until something is measured."""

    @property
    def predicted_bytes(self) -> int:
        """Predicted bytes of all parts."""
        return sum(self.predicted.values())

    @property
    def measured_bytes(self) -> int:
        """Measured peak bytes."""
        return sum(self.measured.values())


def memory_of(plan: Plan, fold: RunHistory, result: Mapping[str, Any] | None) -> tuple[MemoryParts, ...]:
    """Memory by part of each GPU that the plan uses, in rank order.

    result: what `result.json` holds; while there is none, the peaks that ranks have said are all that is known.
    """
    return tuple(_finished(plan, result) if result and "peaks" in result else _running(plan, fold))


def shown(parts: tuple[MemoryParts, ...]) -> tuple[MemoryParts, ...]:
    """All of a few; of many that were predicted alike and came out alike, the fullest for all of them."""
    if len(parts) <= _MOST_SHOWN:
        return parts
    kinds: dict[tuple[int, ...], list[MemoryParts]] = {}
    for own in parts:
        kinds.setdefault(tuple(own.predicted.values()), []).append(own)
    found: list[MemoryParts] = []
    for alike in kinds.values():
        fullest = max(alike, key=lambda own: own.measured_bytes)
        least = min(own.measured_bytes for own in alike)
        if len(alike) > 1 and fullest.measured_bytes - least <= _ALIKE * fullest.measured_bytes:
            found.append(msgspec.structs.replace(fullest, label=f"{fullest.label}, the fullest of {len(alike)} alike"))
        else:
            found += alike
    return tuple(found)


def _finished(plan: Plan, result: Mapping[str, Any]) -> Iterator[MemoryParts]:
    held_by_rank = result.get("held") or [{}] * len(plan.ranks)
    for rank, peaks, held in zip(plan.ranks, result["peaks"], held_by_rank, strict=True):
        stays = {name: held[name] for name in _HELD} if held and len(peaks) == 1 else {}
        for position, (expected, peak) in enumerate(zip(rank.expected, peaks, strict=True)):
            yield MemoryParts(
                label=_label(plan, rank.gpus, position, rank.rank),
                predicted=_predicted(expected),
                measured=_on_cpu(peak, stays) if plan.device == "cpu" else _on_gpu(peak, stays),
            )


def _running(plan: Plan, fold: RunHistory) -> Iterator[MemoryParts]:
    for rank in plan.ranks:
        said = fold.ranks[rank.rank].memory_bytes if rank.rank in fold.ranks else 0
        for position, expected in enumerate(rank.expected):
            measured = {TOTAL: said} if said and len(rank.expected) == 1 else {}
            label = _label(plan, rank.gpus, position, rank.rank)
            yield MemoryParts(label=label, predicted=_predicted(expected), measured=measured)


def _on_gpu(peak: Mapping[str, int], stays: Mapping[str, int]) -> dict[str, int]:
    """Where a rank has several GPUs, what stays is known of all together alone, and its tensors are one part."""
    working = peak["allocated"] - sum(stays.values())
    if not stays or working < 0:
        return {"all tensors": peak["allocated"], "context": peak["context"]}
    return {**stays, WORKING: working, "context": peak["context"]}


def _on_cpu(peak: Mapping[str, int], stays: Mapping[str, int]) -> dict[str, int]:
    total = peak["allocated"] + peak["context"]
    if not stays or sum(stays.values()) > total:
        return {TOTAL: total}
    return {**stays, REST: total - sum(stays.values())}


def _predicted(expected: MemoryBudget) -> dict[str, int]:
    """Optimizer state that can be paged out counts as optimizer state, the margin for activations as activations."""
    found = {name: int(getattr(expected, name)) for name in PARTS}
    own = {"optimizer": expected.pageable, "activations": expected.margin}
    return found | {name: found[name] + more for name, more in own.items()}


def _label(plan: Plan, gpus: tuple[int, ...], position: int, rank: int) -> str:
    if plan.device == "cpu":
        return f"rank {rank}"
    gpu = f"GPU {gpus[position]}"
    return gpu if len(plan.ranks) > 1 and gpus == (rank,) else f"{gpu} (rank {rank})"


MEANING = "an error of +3 % means that 3 % more was predicted than measured"
"""The words beside every table that has the column."""


def error(predicted: float | None, measured: float | None) -> float | None:
    """Error of a prediction as a share of the measured value: 0.03 is 3 % too much; None if either is unknown."""
    return predicted / measured - 1 if predicted and measured else None


def shown_error(predicted: float | None, measured: float | None) -> str:
    """'+3.1 %'; empty if either is unknown."""
    found = error(predicted, measured)
    return "" if found is None else signed(found)
