"""Says on stderr how far quantizing is: a table with a line a decoder layer, what each linear lost in its columns."""

import time
from collections.abc import Mapping
from typing import NamedTuple

from qdist.core.units import format_bytes, format_duration
from qdist.host.terminal import say

_WIDTH = 80


class Outcome(NamedTuple):
    """What became of a linear. Not its solution, which would be kept on the GPU for as long."""

    bits: int
    error: float
    damping: float
    """That its Hessian took."""


class Progress:
    """The time that is left is told from the layers that were made in this process."""

    def __init__(
        self, name: str, layers: int, samples: int, tokens: int, *, made: int, most_error: float, memory: int
    ) -> None:
        """made: layers that are there already. most_error: up to which widths were to be chosen; 0: one width for all.

        memory: bytes that the fullest GPU will need; 0 where there is none.
        """
        self._most_error = most_error
        self._layers, self._left, self._took = layers, layers - made, list[float]()
        self._position, self._began, self._names = 0, time.monotonic(), tuple[str, ...]()
        self._told = dict[str, Outcome]()
        again = f"; {made} of {layers} layers are there already" if made else ""
        room = f", about {format_bytes(memory)} of GPU memory" if memory else ""
        _say(f"quantizing {name} by GPTQ, {samples} samples of {tokens} tokens{room}{again}")

    def begin(self, position: int) -> None:
        self._position, self._began = position, time.monotonic()

    def passed(self) -> None:
        """The layer was there already."""
        _say(f"{self._place()}  there already")

    def done(self, outcomes: Mapping[str, Outcome], *, damping: float) -> None:
        """outcomes: of each linear of the layer, by its path in it.

        damping: what was asked for.
        """
        self._took.append(time.monotonic() - self._began)
        self._left -= 1
        self._told |= {f"{path} of layer {self._position + 1}": outcome for path, outcome in outcomes.items()}
        names = tuple(path.rpartition(".")[2].removesuffix("_proj") for path in outcomes)
        if names != self._names:
            self._names = names
            bits = "bits:" if self._most_error else ""
            _say(f"{bits}relative squared error of each linear's outputs, of these samples")
            _say(self._line(f"{'layer':>{len(self._place())}}", names, "left"))
        cells = [_cell(outcome, mixed=bool(self._most_error)) for outcome in outcomes.values()]
        left = _short(self._left * sum(self._took) / len(self._took)) if self._left else "done"
        _say(self._line(self._place(), cells, left))
        for name, outcome in zip(names, outcomes.values(), strict=True):
            if outcome.damping > damping:
                _say(f"{'':>{len(self._place())}}  {name}: its Hessian took a damping of {outcome.damping:g}")

    def ended(self) -> None:
        """Say which linears of this process err more than was wanted."""
        above = {path: outcome for path, outcome in self._told.items() if outcome.error > self._most_error}
        if self._most_error and above:
            path, worst = max(above.items(), key=lambda item: item[1].error)
            _say(
                f"{len(above)} of {len(self._told)} linears err more than {self._most_error:g} in the widest of the "
                f"widths, the most\n  {path}: {worst.error:.2g} with {worst.bits} bits. A wider one in "
                "--candidate-bits helps"
            )

    def _place(self) -> str:
        return f"{self._position + 1:>{len(str(self._layers))}} of {self._layers}"

    def _line(self, place: str, cells: list[str] | tuple[str, ...], left: str) -> str:
        width = len("3:2.1e-4") if self._most_error else len("2.1e-4")
        columns = [f"{cell:>{max(width, len(name))}}" for cell, name in zip(cells, self._names, strict=True)]
        words = [place, *columns, f"{left:>6}"]
        return next((line for gap in ("  ", " ") if len(line := gap.join(words)) <= _WIDTH), " ".join(words))


def _cell(outcome: Outcome, *, mixed: bool) -> str:
    mantissa, _, exponent = f"{outcome.error:.1e}".partition("e")
    error = f"{mantissa}e{int(exponent)}" if outcome.error else "0"
    return f"{outcome.bits}:{error}" if mixed else error


def _short(seconds: float) -> str:
    """In six characters."""
    for unit, name, upto in ((1, "s", 100), (60, "min", 100), (3600, "h", 1000)):
        if round(seconds / unit) < upto:
            return f"{round(seconds / unit)} {name}"
    return format_duration(seconds)


def note_few_tokens(tokens: int, linear: str, inputs: int) -> None:
    """Where a Hessian has fewer tokens than rows: what is printed says little of other text then."""
    if tokens < inputs:
        _say(
            f"note: {tokens:,} tokens are fewer than the {inputs:,} inputs of {linear}. On other text it will err more "
            "than is\n  told below; more --samples or a larger --seq-len help"
        )


def _say(line: str) -> None:
    """Beside what a script reads of the command."""
    say(line, err=True)
