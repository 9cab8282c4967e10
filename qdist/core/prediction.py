"""How far off was a prediction, and which way round is that said? One answer, for every page."""

from qdist.core.units import signed

MEANING = "an error of +3 % means that 3 % more was predicted than measured"
"""The words beside every table that has the column."""


def error(predicted: float | None, measured: float | None) -> float | None:
    """Of a prediction, as a share of what was measured: 0.03 is 3 % too much. None where one of them is not known."""
    return predicted / measured - 1 if predicted and measured else None


def shown_error(predicted: float | None, measured: float | None) -> str:
    """'+3.1 %'; nothing where one of them is not known."""
    found = error(predicted, measured)
    return "" if found is None else signed(found)
