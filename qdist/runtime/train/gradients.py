"""Does every trained tensor get a gradient? Watched through the first two updates, whatever engine makes them."""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from qdist.core.model.shapes import ModelFacts
from qdist.core.telemetry.gradients import Found, Magnitudes, Section, combine, judge, not_finite
from qdist.runtime.engine.torch import Comm
from qdist.runtime.train.inventory import base_path

UPDATES = 2
"""Updates to watch: with B = 0 at first, A has no gradient until B has moved."""
_LEAST_RATE = {"float16": 2.0**-22}
"""Learning rate below which an update counts for nothing: what it adds to B is zero in the passes' float16."""


class GradientWatch:
    """Largest magnitudes of every trained tensor's gradients, as they come out of this rank's backward passes.

    Hooks on the tensors keep them on the device until the second update is done, and are gone from then on.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], facts: ModelFacts, *, compute_dtype: str) -> None:
        self._sections = {name: section_of(name, parameter, facts) for name, parameter in named.items()}
        self._least_rate = _LEAST_RATE.get(compute_dtype, 0.0)
        self._step: dict[str, torch.Tensor] = {}
        self._updates: list[dict[str, torch.Tensor]] = []
        self._hooks = [parameter.register_hook(partial(self._see, name)) for name, parameter in named.items()]

    def _see(self, name: str, gradient: torch.Tensor | None) -> None:
        if gradient is None:  # computed with others that read its input, but used by nobody
            return
        seen = _largest(gradient.detach(), self._sections[name])
        before = self._step.get(name)
        self._step[name] = seen if before is None else torch.maximum(before, seen)  # which hands NaN on

    def end_step(self, *, skipped: bool, learning_rate: float) -> bool:
        """Whether this step made the last update to watch. One that was skipped, or moved nothing, is forgotten."""
        if not skipped and learning_rate > self._least_rate:
            self._updates.append(self._step)
        self._step = {}
        return len(self._updates) >= UPDATES

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def not_finite(self, comm: Comm) -> str:
        """Tensors whose gradients of this step are NaN or infinite on any rank, in words. Collective."""
        own = [name for name, values in self._read(self._step).items() if not all(map(math.isfinite, values))]
        gathered = comm.gather((list(self._sections), own))
        total = len({name for names, _ in gathered for name in names})
        return not_finite(tuple(dict.fromkeys(name for _, names in gathered for name in names)), total)

    def found(self, comm: Comm) -> Found:
        """What the updates had of gradients on all ranks. Collective. Raises JobError as `judge` does."""
        self.close()
        own = [self._read(update) for update in self._updates]
        gathered = comm.gather((self._sections, own))
        sections: dict[str, Section] = {}
        for theirs, _ in gathered:
            sections.update(theirs)
        updates = [combine(updates[number] for _, updates in gathered) for number in range(UPDATES)]
        return judge(sections, updates)

    def _read(self, seen: Mapping[str, torch.Tensor]) -> Magnitudes:
        """The magnitudes in host memory, with one wait for the device."""
        if not seen:
            return {}
        device = next(iter(seen.values())).device
        values = iter(torch.cat([value.to(device) for value in seen.values()]).tolist())
        return {name: [next(values) for _ in range(value.numel())] for name, value in seen.items()}


def section_of(name: str, parameter: nn.Parameter, facts: ModelFacts) -> Section:
    """What in a trained tensor may rest while the rest of it learns."""
    if name.endswith("trainable_tokens_delta") or ".trainable_tokens_delta." in name:
        return Section("rows", parameter.shape[0])
    path, side, _ = name.partition(".lora_")
    found = facts.layer_at(base_path(path)) if side else None
    experts = facts.shapes[facts.run_of_layer[found[0]]].experts if found else None
    if found and experts and f"{found[1]}.".startswith(f"{experts.path}."):
        return Section("experts", experts.count, owner=base_path(path), side="A" if "_A." in name else "B")
    return Section("whole", 1)


def _largest(gradient: torch.Tensor, section: Section) -> torch.Tensor:
    """The largest magnitude in each section, float32.

    PEFT has A of experts as [experts x r, in] and B as [out, r x experts].
    """
    magnitudes = gradient.abs()
    if section.side == "B":
        largest = magnitudes.reshape(-1, section.parts).amax(0)
    elif section.kind == "whole":
        largest = magnitudes.amax().reshape(1)
    else:
        largest = magnitudes.reshape(section.parts, -1).amax(1)
    return largest.float()
