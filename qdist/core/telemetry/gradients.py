"""Have all trained tensors had gradients? A verdict on the largest magnitudes of two updates."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from qdist.core.errors import JobError
from qdist.core.text import counted, first_few

Magnitudes = Mapping[str, Sequence[float]]
"""Largest magnitude of each section of each tensor's gradient; without those that had none."""


_NUMBERS = 8
"""Experts of a module that are named."""


class Section(NamedTuple):
    """What of a trained tensor is looked at by itself, as it may rest while the rest of it learns."""

    kind: Literal["whole", "rows", "experts"]
    """rows: of new tokens, which have a gradient once their token is met. experts: likewise."""
    parts: int
    owner: str = ""
    """Path of the module that has the experts."""
    side: Literal["", "A", "B"] = ""
    """Which of the two matrices of an adapter on experts."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors with a finite gradient that is not zero, and what was excepted."""

    tensors: int
    rows: int = 0
    idle_rows: int = 0
    """Rows of new tokens that were not met."""
    experts: int = 0
    idle_experts: int = 0
    """Experts that no token was sent to."""
    named: tuple[str, ...] = ()
    """Where the idle ones are."""

    @property
    def words(self) -> str:
        """'finite and not zero in all 28 trained tensors'."""
        said = f"finite and not zero in {_all(self.tensors)}"
        if self.idle_rows:
            said += f"; {self.idle_rows:,} of {counted(self.rows, 'row')} of new tokens saw no token"
        if self.idle_experts:
            said += f"; {self.idle_experts:,} of {counted(self.experts, 'expert')} saw no token"
        return said + (f" ({first_few(self.named)})" if self.named else "")


def _all(tensors: int) -> str:
    return f"all {tensors:,} trained tensors" if tensors > 1 else "the trained tensor"


def combine(ranks: Iterable[Magnitudes]) -> dict[str, list[float]]:
    """The largest magnitudes over all ranks; NaN if any has it."""
    found: dict[str, list[float]] = {}
    for own in ranks:
        for name, values in own.items():
            before = found.get(name, [0.0] * len(values))
            found[name] = [a if a >= b or math.isnan(a) else b for a, b in zip(before, values, strict=True)]
    return found


def judge(sections: Mapping[str, Section], updates: Sequence[Magnitudes]) -> Found:
    """What two updates say of all trained tensors.

    A row of a new token, and an expert, may have no gradient: no token was theirs. An expert that some matrix of it
    shows to have had tokens may not.
    Raises JobError naming tensors whose gradient is missing, zero or not finite.
    """
    unseen = [name for name in sections if not any(name in update for update in updates)]
    infinite = [name for update in updates for name, values in update.items() if not all(map(math.isfinite, values))]
    _refuse(infinite, len(sections), "have a gradient that is NaN or infinite")
    _refuse(unseen, len(sections), "have had no gradient in the first two updates: they are not part of the loss")
    largest = {name: [max(values) for values in zip(*_of(name, updates), strict=True)] for name in sections}
    zero = [name for name, section in sections.items() if section.kind != "rows" and not any(largest[name])]
    zero += _half_idle(sections, updates, largest)
    _refuse(zero, len(sections), "have had a gradient of nothing but zeros in the first two updates")
    rows = [value for name, section in sections.items() if section.kind == "rows" for value in largest[name]]
    idle = _idle_experts(sections, largest)
    resting = [name for name, section in sections.items() if section.kind == "rows" and not all(largest[name])]
    return Found(
        tensors=len(sections),
        rows=len(rows),
        idle_rows=rows.count(0.0),
        experts=sum({section.owner: section.parts for section in sections.values() if section.owner}.values()),
        idle_experts=sum(map(len, idle.values())),
        named=(
            *resting,
            *(
                f"{owner} {first_few(tuple(map(str, numbers)), most=_NUMBERS)}"
                for owner, numbers in idle.items()
                if numbers
            ),
        ),
    )


def _of(name: str, updates: Sequence[Magnitudes]) -> list[Sequence[float]]:
    return [update[name] for update in updates if name in update]


def _idle_experts(sections: Mapping[str, Section], largest: Magnitudes) -> dict[str, list[int]]:
    """Experts without a gradient in any B, by the module that has them."""
    alike: dict[str, list[Sequence[float]]] = {}
    for name, section in sections.items():
        if section.side == "B":
            alike.setdefault(section.owner, []).append(largest[name])
    return {
        owner: [number for number, values in enumerate(zip(*matrices, strict=True)) if not any(values)]
        for owner, matrices in alike.items()
    }


def _half_idle(sections: Mapping[str, Section], updates: Sequence[Magnitudes], largest: Magnitudes) -> list[str]:
    """Tensors with an expert that has no gradient there, and has had tokens: some B of it has a gradient.

    A has one only from the second update on, so there an expert must have had tokens in both.
    """
    met = [_met(sections, update) for update in updates]
    found = []
    for name, section in sections.items():
        idle = {number for number, value in enumerate(largest[name]) if not value}
        seen = [own.get(section.owner, set()) for own in met]
        busy = set.union(*seen) if section.side == "B" else set.intersection(*seen)
        if section.kind == "experts" and any(largest[name]) and idle & busy:
            found.append(f"{name} (expert {min(idle & busy)})")
    return found


def _met(sections: Mapping[str, Section], update: Magnitudes) -> dict[str, set[int]]:
    """Experts with a gradient in some B, by the module that has them."""
    met: dict[str, set[int]] = {}
    for name, values in update.items():
        if sections[name].side == "B":
            met.setdefault(sections[name].owner, set()).update(n for n, value in enumerate(values) if value)
    return met


def _refuse(names: Sequence[str], total: int, what: str) -> None:
    if names:
        found = list(dict.fromkeys(names))
        raise JobError(
            f"{len(found)} of {counted(total, 'trained tensor')} {what}: {first_few(found)}",
            try_="report this with the output of qdist doctor, or other --set lora.targets",
        )


def not_finite(names: Sequence[str], total: int) -> str:
    """Which of all trained tensors have such gradients, to follow the sentence that says so."""
    return f", in {len(names)} of {counted(total, 'trained tensor')}: {first_few(names)}" if names else ""
