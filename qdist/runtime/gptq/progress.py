"""Says on stderr how far quantizing is: a line a decoder layer, with what each linear lost."""

import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

from qdist.core.units import format_bytes, format_duration


class Outcome(NamedTuple):
    """What became of a linear. Not its solution, which would be kept on the GPU for as long."""

    bits: int
    error: float
    damping: float
    """That its Hessian took."""


class Progress:
    """The time that is left is told from the layers that were made in this process."""

    def __init__(
        self, name: str, layers: int, samples: int, tokens: int, *, made: int, mixed: bool, memory: int
    ) -> None:
        """made: layers that are there already. mixed: whether linears may differ in width, which is then told.

        memory: bytes that the fullest GPU will need; 0 where there is none.
        """
        self._mixed = mixed
        self._layers, self._left, self._took = layers, layers - made, list[float]()
        self._position, self._began = 0, time.monotonic()
        again = f"; {made} of {layers} layers are there already" if made else ""
        room = f", about {format_bytes(memory)} of GPU memory" if memory else ""
        _say(f"quantizing {name} by GPTQ, {samples} samples of {tokens} tokens{room}{again}")

    def begin(self, position: int) -> None:
        self._position, self._began = position, time.monotonic()

    def passed(self) -> None:
        """The layer was there already."""
        _say(f"  layer {self._position + 1} of {self._layers}: there already")

    def done(self, outcomes: Mapping[str, Outcome], *, damping: float) -> None:
        """outcomes: of each linear of the layer, by its path in it.

        damping: what was asked for.
        """
        self._took.append(time.monotonic() - self._began)
        self._left -= 1
        parts = []
        for path, outcome in outcomes.items():
            width = f" ({outcome.bits} bits)" if self._mixed else ""
            raised = f" (damping {outcome.damping:g})" if outcome.damping > damping else ""
            parts.append(f"{path.rpartition('.')[2]} {outcome.error:.4f}{width}{raised}")
        rest = format_duration(self._left * sum(self._took) / len(self._took))
        ending = f"{rest} left" if self._left else "done"
        _say(f"  layer {self._position + 1} of {self._layers}: error {', '.join(parts)}; {ending}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
