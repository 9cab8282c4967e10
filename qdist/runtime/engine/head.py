"""What does a class do around its output head, from the decoder's hidden states to logits?"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from qdist.core.errors import ModelError
from qdist.runtime.model.parts import decoder_path, head_of, parts_of

_ROUNDING = 1e-4
"""Relative difference up to which the class's logits count as those of a rule: of float32."""


class HeadRule(NamedTuple):
    """logits = cap(after (head(before x hidden))), where cap is softcap x tanh(. / softcap)."""

    before: float = 1.0
    """Factor on hidden states."""
    after: float = 1.0
    """Factor on the head's output."""
    softcap: float | None = None
    plain: bool = True
    """Whether that is all that the class does; otherwise its own code computes logits."""

    def of(self, outputs: torch.Tensor) -> torch.Tensor:
        """Logits from the head's output."""
        scaled = outputs if self.after == 1.0 else outputs * self.after
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def into(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's input from hidden states."""
        return hidden if self.before == 1.0 else hidden * self.before


def head_rule(model: Any) -> HeadRule:
    """What a model's class does around its head, found out once by giving it numbers in the decoder's and head's place.

    So scales (Granite, Cohere, MiniCPM3, Falcon-H1) and softcaps (Gemma) are those of the class, whatever their names.
    Raises ModelError for a class whose loss is not the cross entropy of its logits alone.
    """
    found: HeadRule | None = vars(model).get("qdist_head_rule")
    if found is None:
        if getattr(model.config, "z_loss_coefficient", 0):
            raise ModelError(
                f"z_loss_coefficient={model.config.z_loss_coefficient:g} in config.json adds to the cross entropy, "
                "which qdist does not do",
                try_="z_loss_coefficient: 0 in config.json",
            )
        found = model.qdist_head_rule = _found_out(model)
    return found


def class_logits(model: Any, hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Any:
    """Logits [batch, length, vocabulary] that a class's own forward pass makes of hidden states.

    hidden: stands for the decoder's output. head: stands for the output head; None for the real one.
    """
    parts = parts_of(model)
    outputs = _Outputs(hidden)
    replaced: Any = _InPlaceOf(model.get_submodule(decoder_path(model)), {}, lambda *_, **__: outputs)
    steps = decoder_path(model).split(".")
    for depth in range(len(steps) - 1, 0, -1):
        outer = model.get_submodule(".".join(steps[:depth]))
        replaced = _InPlaceOf(outer, {steps[depth]: replaced}, lambda *_, **__: outputs)
    others = {} if head is None else {parts.head: _InPlaceOf(head_of(model), {}, head)}
    top = _InPlaceOf(model, {steps[0]: replaced, **others}, None)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    return inspect.unwrap(type(model).forward)(top, input_ids=ids).logits


class _InPlaceOf:
    """Answers for a module, except for some of its attributes and for calls."""

    def __init__(self, real: Any, replaced: dict[str, Any], call: Callable[..., Any] | None) -> None:
        self._real, self._replaced, self._call = real, replaced, call

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(self._real, name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._call(*given, **named) if self._call else None


class _Outputs:
    """A decoder's outputs of which only the hidden states are there."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, position: int) -> torch.Tensor | None:
        return self.last_hidden_state if position == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def _found_out(model: Any) -> HeadRule:
    head = head_of(model)
    if "." in parts_of(model).head or not hasattr(head, "out_features"):
        return HeadRule(plain=False)
    given: list[torch.Tensor] = []
    device = torch.device("cpu") if head.weight.is_meta else head.weight.device
    outputs = torch.linspace(-300.0, 300.0, head.out_features, device=device).reshape(1, 1, -1)
    hidden = torch.tensor([1.0, 2.0, -4.0, 8.0], device=device).repeat(head.in_features)[: head.in_features]

    def record(value: torch.Tensor) -> torch.Tensor:
        given.append(value)
        return outputs

    narrow = head.weight.dtype if head.weight.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    with torch.autocast(device.type, dtype=narrow, enabled=narrow == head.weight.dtype):
        logits = class_logits(model, hidden.reshape(1, 1, -1), record)
    before = _factor(hidden, given[0].float().flatten()) if len(given) == 1 else None
    rule = None if before is None or logits.shape != outputs.shape else _scaled(outputs, logits.float(), before)
    return rule or HeadRule(plain=False)


def _factor(given: torch.Tensor, made: torch.Tensor) -> float | None:
    """The number that `given` was multiplied by; None if it was something else that was done to it."""
    if given.shape != made.shape:
        return None
    factor = float(made[0] / given[0])
    return factor if torch.allclose(made, given * factor, rtol=_ROUNDING, atol=0.0) else None


def _scaled(outputs: torch.Tensor, logits: torch.Tensor, before: float) -> HeadRule | None:
    """The rule that makes these logits of a head's outputs; None if there is none."""
    factor = _factor(outputs.flatten(), logits.flatten())
    if factor is not None:
        return HeadRule(before, factor)
    nearest = outputs.abs().argmin()
    cap = float(logits.max())
    slope = cap * float(torch.atanh(logits.flatten()[nearest] / cap) / outputs.flatten()[nearest])
    rule = HeadRule(before, 1.0 if abs(slope - 1) < _ROUNDING else slope, cap)
    return rule if torch.allclose(rule.of(outputs), logits, rtol=_ROUNDING, atol=_ROUNDING) else None
